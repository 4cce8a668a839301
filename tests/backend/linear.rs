//! Projections of every encoding, on every tier that this machine has.

use astrai_rs::backend::reference;
use astrai_rs::config::DType;
use astrai_rs::spec::Activation;
use astrai_rs::weights::Encoding;
use candle_core::Tensor;

use crate::backend_support::{Random, assert_close, backends, bits, stored, tensor, values};
use crate::{DTYPES, ENCODINGS};

/// Exact products differ from the reference only by the order of the sum; bf16 activations by their
/// rounding (2^-9 each), and dense weights by theirs where the dtype changes them.
fn linear_tolerance(encoding: Encoding, dtype: DType) -> f32 {
    let coarse = match dtype {
        DType::Float32 => false,
        DType::Auto => encoding != Encoding::F16,
        DType::BFloat16 => true,
        DType::Float16 => return 2e-3,
    };
    if coarse { 1.5e-2 } else { 1e-5 }
}

#[test]
fn linear_matches_the_reference() {
    let mut random = Random::new(1);
    for dtype in DTYPES {
        for backend in backends(2, dtype) {
            for encoding in ENCODINGS {
                let dense = encoding.block_len() == 1;
                let cols: &[usize] = if dense { &[48, 80, 7, 1] } else { &[32, 96, 352] };
                for (&cols, out) in cols.iter().zip([33, 128, 97, 16]) {
                    let weight = stored(&mut random, &[out, cols], encoding);
                    let plain = values(&backend.vector(&weight).unwrap());
                    let bias = random.floats(out);
                    let packed = backend.pack(&[weight], Some(bias.clone())).unwrap();
                    for rows in [1, 3, 13, 29] {
                        let x = random.floats(rows * cols);
                        let got = backend.linear(&tensor(&x, &[rows, cols]), &packed).unwrap();
                        assert_eq!(got.dims(), [rows, out]);
                        let want = reference::linear(&x, &plain, cols, Some(&bias));
                        // Outputs are sums of `cols` products of numbers around 1.
                        let tolerance = linear_tolerance(encoding, dtype) * (cols as f32).sqrt();
                        assert_close(&values(&got), &want, tolerance, || {
                            format!("{} {dtype:?} {encoding:?} {rows}x{cols}x{out}", backend.tier())
                        });
                    }
                }
            }
        }
    }
}

/// Tiers in which quantised weights meet 16-bit integers.
const INTEGER_TIERS: [&str; 3] = ["avx2", "avxvnni", "avx512vnni"];

/// Rows to bf16, or to 16-bit multiples of a scale for each row.
fn rounded(x: &[f32], cols: usize, to_integers: bool) -> Vec<f32> {
    if !to_integers {
        return x.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect();
    }
    let row = |row: &[f32]| {
        let scale = row.iter().fold(0.0_f32, |a, x| a.max(x.abs())) / 32767.0;
        let round = |x: f32| (x * (1.0 / scale)).round_ties_even() * scale;
        row.iter().copied().map(round).collect::<Vec<_>>()
    };
    x.chunks(cols).flat_map(row).collect()
}

#[test]
fn fast_arithmetic_is_exact_but_for_the_rounding_of_activations() {
    let mut random = Random::new(2);
    for backend in backends(1, DType::Auto) {
        for encoding in [Encoding::BF16, Encoding::Q4_0, Encoding::Q4_1, Encoding::Q8_0] {
            let weight = stored(&mut random, &[64, 256], encoding);
            let plain = values(&backend.vector(&weight).unwrap());
            let packed = backend.pack(&[weight], None).unwrap();
            let to_integers = INTEGER_TIERS.contains(&backend.tier()) && encoding != Encoding::BF16;
            let given = random.floats(3 * 256);
            let x = rounded(&given, 256, to_integers);
            let given = if to_integers { &given } else { &x };
            let got = backend.linear(&tensor(given, &[3, 256]), &packed).unwrap();
            let want = reference::linear(&x, &plain, 256, None);
            assert_close(&values(&got), &want, 1e-4, || format!("{} {encoding:?}", backend.tier()));
        }
    }
}

#[test]
fn beside_an_outlier_activations_are_off_by_half_a_step_at_most() {
    let mut random = Random::new(21);
    let weight = stored(&mut random, &[32, 128], Encoding::Q8_0);
    let mut x = random.floats(128);
    x[70] = 3000.0;
    for backend in backends(1, DType::Auto) {
        if !INTEGER_TIERS.contains(&backend.tier()) {
            continue;
        }
        let plain = values(&backend.vector(&weight).unwrap());
        let packed = backend.pack(std::slice::from_ref(&weight), None).unwrap();
        let got = values(&backend.linear(&tensor(&x, &[1, 128]), &packed).unwrap());
        let want = reference::linear(&x, &plain, 128, None);
        for (row, (got, want)) in got.iter().zip(&want).enumerate() {
            let size: f32 = plain[row * 128..][..128].iter().map(|w| w.abs()).sum();
            // Half a step of the row's scale for each weight, and the rounding of f32 sums.
            let bound = 3000.0 / 65534.0 * size + want.abs() * 1e-5;
            assert!((got - want).abs() <= bound, "{} row {row}: {got}, {want}", backend.tier());
        }
    }
}

#[test]
fn integers_of_every_width_have_the_same_sums() {
    let mut random = Random::new(12);
    let mut backends = backends(1, DType::Auto);
    backends.retain(|backend| INTEGER_TIERS.contains(&backend.tier()));
    for encoding in [Encoding::Q4_0, Encoding::Q4_1, Encoding::Q8_0] {
        let weight = stored(&mut random, &[80, 224], encoding);
        for rows in [1, 2, 5, 8, 14, 40] {
            let x = tensor(&random.floats(rows * 224), &[rows, 224]);
            let mut all = backends.iter().map(|backend| {
                let packed = backend.pack(std::slice::from_ref(&weight), None).unwrap();
                (backend.tier(), bits(&backend.linear(&x, &packed).unwrap()))
            });
            let Some((_, first)) = all.next() else { return };
            all.for_each(|(tier, got)| assert_eq!(got, first, "{tier} {encoding:?} {rows} rows"));
        }
    }
}

#[test]
fn parts_of_different_encodings_stack() {
    let mut random = Random::new(3);
    for backend in backends(2, DType::Auto) {
        let parts: Vec<_> = ENCODINGS
            .into_iter()
            .zip([5, 32, 33, 17, 64, 3])
            .map(|(encoding, out)| stored(&mut random, &[out, 64], encoding))
            .collect();
        let x = random.floats(2 * 64);
        let want: Vec<_> = parts
            .iter()
            .map(|part| {
                let alone = backend.pack(std::slice::from_ref(part), None).unwrap();
                backend.linear(&tensor(&x, &[2, 64]), &alone).unwrap()
            })
            .collect();
        let want = Tensor::cat(&want, 1).unwrap();
        let all = backend.pack(&parts, None).unwrap();
        let got = backend.linear(&tensor(&x, &[2, 64]), &all).unwrap();
        assert_eq!(bits(&got), bits(&want), "{}", backend.tier());
    }
}

#[test]
fn a_row_of_linear_does_not_depend_on_its_batch() {
    let mut random = Random::new(4);
    for backend in backends(2, DType::Auto) {
        for encoding in ENCODINGS {
            let packed = backend.pack(&[stored(&mut random, &[70, 352], encoding)], None).unwrap();
            let x = tensor(&random.floats(40 * 352), &[40, 352]);
            let whole = bits(&backend.linear(&x, &packed).unwrap());
            for start in 0..40 {
                for len in [1, 2, 5, 7, 8, 12, 17, 21, 26] {
                    let len = len.min(40 - start);
                    let part = x.narrow(0, start, len).unwrap();
                    let part = bits(&backend.linear(&part, &packed).unwrap());
                    assert_eq!(
                        part,
                        whole[start * 70..(start + len) * 70],
                        "{} {encoding:?} rows {start}+{len}",
                        backend.tier()
                    );
                }
            }
        }
    }
}

#[test]
fn many_rows_that_are_computed_in_blocks_are_those_of_fewer() {
    let mut random = Random::new(23);
    let (rows, cols) = (200, 1600);
    let x = tensor(&random.floats(rows * cols), &[rows, cols]);
    for backend in backends(2, DType::Auto) {
        for encoding in [Encoding::Q4_0, Encoding::BF16] {
            let weight = stored(&mut random, &[64, cols], encoding);
            let packed = backend.pack(&[weight], None).unwrap();
            let linear = |x: &Tensor| bits(&backend.linear(x, &packed).unwrap());
            let gated =
                |x: &Tensor| bits(&backend.gated_linear(x, &packed, Activation::Silu).unwrap());
            let halves = [0, 100].map(|start| x.narrow(0, start, 100).unwrap());
            let what = format!("{} {encoding:?}", backend.tier());
            assert_eq!(linear(&x), halves.each_ref().map(linear).concat(), "{what}");
            assert_eq!(gated(&x), halves.each_ref().map(gated).concat(), "{what}");
        }
    }
}

#[test]
fn integers_hide_no_broken_activations() {
    let mut random = Random::new(14);
    for backend in backends(1, DType::Auto) {
        let packed = backend.pack(&[stored(&mut random, &[32, 64], Encoding::Q8_0)], None).unwrap();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = random.floats(3 * 64);
            x[64 + 40] = bad;
            let got = values(&backend.linear(&tensor(&x, &[3, 64]), &packed).unwrap());
            let is_finite = |row: usize| got[row * 32..][..32].iter().all(|x| x.is_finite());
            assert_eq!([0, 1, 2].map(is_finite), [true, false, true], "{} {bad}", backend.tier());
        }
        for small in [0.0, 1e-40, 1e-36] {
            let x = tensor(&[small; 64], &[1, 64]);
            let got = values(&backend.linear(&x, &packed).unwrap());
            assert!(got.iter().all(|x| x.abs() < 1e-30), "{} {small} {got:?}", backend.tier());
        }
    }
}

#[test]
fn gates_in_a_projection_are_those_after_it() {
    let mut random = Random::new(17);
    let backends = [DType::Auto, DType::Float32].map(|dtype| backends(2, dtype));
    for backend in backends.iter().flatten() {
        for (width, encodings) in [
            (64, [Encoding::Q4_0; 2]),
            (96, [Encoding::BF16; 2]),
            (32, [Encoding::Q4_1, Encoding::Q8_0]),
            (1056, [Encoding::Q8_0, Encoding::F32]),
            (48, [Encoding::F32; 2]), // which share a panel
            (20, [Encoding::Q8_0, Encoding::BF16]),
        ] {
            let parts = encodings.map(|encoding| stored(&mut random, &[width, 96], encoding));
            for (rows, biased) in [(1, true), (1, false), (3, true), (9, false), (150, width < 64)]
            {
                let bias = biased.then(|| random.floats(2 * width));
                let packed = backend.pack(&parts, bias).unwrap();
                let x = tensor(&random.floats(rows * 96), &[rows, 96]);
                let both = backend.linear(&x, &packed).unwrap();
                let want = backend.gated_activation(&both, Activation::Silu).unwrap();
                let got = backend.gated_linear(&x, &packed, Activation::Silu).unwrap();
                assert_eq!(got.dims(), [rows, width]);
                let what = format!("{} {encodings:?} {rows}x{width}", backend.tier());
                assert_eq!(bits(&got), bits(&want), "{what}");
            }
        }
    }
}
