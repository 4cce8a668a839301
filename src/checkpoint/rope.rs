//! Rotary settings of a Hugging Face `config.json`, in the old style (`rope_theta`, `rope_scaling`)
//! and that of transformers 5 (`rope_parameters`).
//!
//! Source: transformers, `modeling_rope_utils.py`.

use super::fields::{Fields, differ};
use crate::error::{Error, Result};
use crate::spec::{RopePairing, RopeScaling, RopeSpec};

/// What every supported family uses when the configuration names no base.
const DEFAULT_THETA: f64 = 10_000.0;

/// A non-empty `rope_scaling` takes the place of `rope_parameters`; a base inside of it goes before
/// the one beside it.
pub(super) fn spec(config: &Fields, max_positions: usize) -> Result<RopeSpec> {
    let scaling = config.opt_object("rope_scaling")?.filter(|fields| !fields.is_empty());
    let fields = match scaling {
        Some(fields) => Some(fields),
        None => config.opt_object("rope_parameters")?,
    };
    let beside = config.opt_number("rope_theta")?;
    require_full_rotation(config)?;
    let mut rope = RopeSpec {
        theta: beside.unwrap_or(DEFAULT_THETA),
        pairing: RopePairing::HalfSplit,
        scaling: RopeScaling::None,
    };
    if let Some(fields) = fields {
        require_full_rotation(&fields)?;
        rope.theta = fields.opt_number("rope_theta")?.unwrap_or(rope.theta);
        let outer = config.opt_size("original_max_position_embeddings")?;
        let original = match outer {
            Some(positions) => positions,
            None => fields.opt_size("original_max_position_embeddings")?.unwrap_or(max_positions),
        };
        rope.scaling = rope_scaling(&fields, original)?;
    }
    Ok(rope)
}

fn rope_scaling(fields: &Fields, original_max_positions: usize) -> Result<RopeScaling> {
    for kind in ["full_attention", "sliding_attention"] {
        if fields.has(kind) {
            let name = fields.name(kind);
            return Err(Error::unsupported(format!("{name}: rotary settings per layer type")));
        }
    }
    let key = if fields.has("rope_type") { "rope_type" } else { "type" };
    match fields.opt_text(key)?.unwrap_or("default") {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: fields.number("factor")? }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: fields.number("factor")?,
            low_freq_factor: fields.number("low_freq_factor")?,
            high_freq_factor: fields.number("high_freq_factor")?,
            original_max_positions,
        }),
        "yarn" => yarn(fields, original_max_positions),
        other => Err(Error::unsupported(format!(
            "{} {other:?} is not supported; supported: default, linear, llama3, yarn",
            fields.name(key)
        ))),
    }
}

fn yarn(fields: &Fields, original_max_positions: usize) -> Result<RopeScaling> {
    // Python's `value or default`: zero counts as absent.
    let given = |key| Ok::<_, Error>(fields.opt_number(key)?.filter(|&value| value != 0.0));
    let factor = fields.number("factor")?;
    let attention_factor = match fields.opt_number("attention_factor")? {
        Some(value) => value,
        None => match (given("mscale")?, given("mscale_all_dim")?) {
            (Some(mscale), Some(all_dim)) => magnitude(factor, mscale) / magnitude(factor, all_dim),
            _ => magnitude(factor, 1.0),
        },
    };
    Ok(RopeScaling::Yarn {
        factor,
        original_max_positions,
        beta_fast: given("beta_fast")?.unwrap_or(32.0),
        beta_slow: given("beta_slow")?.unwrap_or(1.0),
        attention_factor,
        truncate: fields.flag("truncate", true)?,
    })
}

/// The paper's temperature, `0.1 ln(factor) + 1`.
fn magnitude(factor: f64, scale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 }
}

fn require_full_rotation(fields: &Fields) -> Result<()> {
    match fields.opt_number("partial_rotary_factor")? {
        Some(share) if differ(share, 1.0) => Err(Error::unsupported(format!(
            "{} {share} is not supported; heads are rotated in full",
            fields.name("partial_rotary_factor")
        ))),
        _ => Ok(()),
    }
}
