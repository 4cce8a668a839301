//! Checks of what callers hand to the ops: every error names what was given and what is expected.

use candle_core::{DType, Tensor};

use super::{Batch, Heads, LayerKv, RopeOp};
use crate::config::BLOCK_SIZE;
use crate::error::{Error, Result};
use crate::spec::QkNorm;
use crate::weights::StoredTensor;

/// Number of rows of a tensor `[rows, width]`; any width of at least one when `None`.
pub(super) fn rows(name: &str, x: &Tensor, width: Option<usize>, dtype: DType) -> Result<usize> {
    let wanted = width.map_or("width".into(), |width| width.to_string());
    let dims = x.dims();
    let fits = dims.len() == 2 && dims[1] > 0 && width.is_none_or(|width| dims[1] == width);
    if !fits || x.dtype() != dtype || !x.is_contiguous() {
        return Err(Error::bug(format!(
            "`{name}` must be contiguous {} [tokens, {wanted}]; given: {}",
            dtype.as_str(),
            describe(x)
        )));
    }
    Ok(dims[0])
}

/// A contiguous tensor of exactly this shape.
pub(super) fn shape(name: &str, x: &Tensor, shape: &[usize], dtype: DType) -> Result<()> {
    if x.dims() != shape || x.dtype() != dtype || !x.is_contiguous() {
        return Err(Error::bug(format!(
            "`{name}` must be contiguous {} {shape:?}; given: {}",
            dtype.as_str(),
            describe(x)
        )));
    }
    Ok(())
}

fn describe(x: &Tensor) -> String {
    let order = if x.is_contiguous() { "contiguous" } else { "strided" };
    format!("{order} {} {:?}", x.dtype().as_str(), x.dims())
}

/// Matrices of one width; returns the rows of all.
pub(super) fn parts(parts: &[StoredTensor]) -> Result<usize> {
    let cols = parts.first().map_or(0, StoredTensor::cols);
    for part in parts {
        if part.shape.len() != 2 || part.rows() == 0 || cols == 0 || part.cols() != cols {
            return Err(Error::checkpoint(format!(
                "tensor `{}` must be a matrix [out, {cols}]; given: {:?}",
                part.name, part.shape
            )));
        }
    }
    if parts.is_empty() {
        return Err(Error::bug("a projection needs at least one matrix"));
    }
    Ok(parts.iter().map(StoredTensor::rows).sum())
}

/// Head counts that divide.
pub(super) fn heads(heads: Heads) -> Result<()> {
    let Heads { num_heads, num_kv_heads, head_dim } = heads;
    let counts = num_heads > 0 && num_kv_heads > 0 && num_heads.is_multiple_of(num_kv_heads);
    if !counts || head_dim == 0 || !head_dim.is_multiple_of(2) {
        return Err(Error::bug(format!(
            "kv heads must divide heads, and head_dim be even; given: {heads:?}"
        )));
    }
    Ok(())
}

/// The merged projection is wide enough for its heads; returns its rows.
pub(super) fn qkv(x: &Tensor, given: Heads, dtype: DType) -> Result<usize> {
    heads(given)?;
    let count = rows("qkv", x, None, dtype)?;
    let wanted = (given.num_heads + 2 * given.num_kv_heads) * given.head_dim;
    if x.dims()[1] < wanted {
        return Err(Error::bug(format!(
            "`qkv` must be at least {wanted} wide for {given:?}; given: {:?}",
            x.dims()
        )));
    }
    Ok(count)
}

/// The pages have `page` numbers each; returns the number of blocks.
pub(super) fn pages(kv: &LayerKv, page: usize, dtype: DType) -> Result<usize> {
    match *kv.pages.dims() {
        [2, blocks, width]
            if width == page && kv.pages.dtype() == dtype && kv.pages.is_contiguous() =>
        {
            Ok(blocks)
        }
        _ => Err(Error::bug(format!(
            "pages must be contiguous {} [2, num_blocks, {page}]; given: {}",
            dtype.as_str(),
            describe(&kv.pages)
        ))),
    }
}

/// The runs are the rows in order, without gaps, and their blocks cover their positions.
pub(super) fn batch(batch: &Batch, rows: usize, num_blocks: usize) -> Result<()> {
    if batch.positions.len() != rows {
        return Err(Error::bug(format!(
            "the batch has {} positions for {rows} rows",
            batch.positions.len()
        )));
    }
    let mut next = 0;
    for run in &batch.runs {
        if run.rows.start != next || run.rows.end < next || run.rows.end > rows {
            return Err(Error::bug(format!(
                "run {:?} must follow row {next} and end within {rows} rows",
                run.rows
            )));
        }
        next = run.rows.end;
        let blocks = batch.blocks.get(run.blocks.clone()).ok_or_else(|| {
            Error::bug(format!("blocks {:?} are outside of {}", run.blocks, batch.blocks.len()))
        })?;
        let last = batch.positions[run.rows.clone()].iter().max();
        if last.is_some_and(|&last| last as usize / BLOCK_SIZE >= blocks.len()) {
            return Err(Error::bug(format!(
                "position {last:?} is outside of the {} blocks of its run",
                blocks.len()
            )));
        }
        if let Some(block) = blocks.iter().find(|block| block.0 as usize >= num_blocks) {
            return Err(Error::bug(format!("{block:?} is outside of the {num_blocks} pages")));
        }
    }
    if next != rows {
        return Err(Error::bug(format!("the runs of the batch end at row {next} of {rows}")));
    }
    Ok(())
}

/// The tables reach the positions, and the norm weights are those that `qk_norm` needs.
pub(super) fn rope(op: &RopeOp, heads: Heads, positions: &[u32]) -> Result<()> {
    let half = heads.head_dim / 2;
    let reach = rows("cos", &op.cos, Some(half), DType::F32)?;
    shape("sin", &op.sin, &[reach, half], DType::F32)?;
    if let Some(&position) = positions.iter().find(|&&position| position as usize >= reach) {
        return Err(Error::bug(format!(
            "position {position} is beyond the {reach} of the rope table"
        )));
    }
    for (name, norm) in [("q_norm", &op.q_norm), ("k_norm", &op.k_norm)] {
        match norm {
            Some(weight) => shape(name, weight, &[heads.head_dim], DType::F32)?,
            None if op.qk_norm == QkNorm::None => {}
            None => {
                return Err(Error::bug(format!("`{name}` is missing for {:?}", op.qk_norm)));
            }
        }
    }
    Ok(())
}
