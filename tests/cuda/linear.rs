//! Linear layers of every format, for few rows and for many.

#[cfg(feature = "cuda-emulator")]
use astrai_rs::backend::emulator;
use astrai_rs::backend::{Backend, reference};
use astrai_rs::config::DType;
use astrai_rs::spec::Activation;
use astrai_rs::weights::Encoding;

use crate::backend_support::{Random, assert_close, gpu, round_like_cache, stored};
use crate::{DTYPES, activations, bits, grain, values};

#[test]
fn linear_matches_the_reference() {
    let mut random = Random::new(1);
    for dtype in DTYPES {
        let backend = gpu(dtype);
        // The last has blocks enough for small ones, whose warps have two slices each.
        for (cols, out) in
            [(8, 1), (24, 16), (48, 33), (136, 17), (576, 40), (2560, 24), (1096, 260)]
        {
            let weight = stored(&mut random, &[out, cols], Encoding::F32);
            let plain: Vec<f32> = values(&backend.vector(&weight).unwrap())
                .into_iter()
                .map(|x| round_like_cache(x, backend.activation_dtype()))
                .collect();
            let bias = random.floats(out);
            let packed = backend.pack(&[weight], Some(bias.clone())).unwrap();
            for rows in [1, 3, 8, 9, 17, 40, 70] {
                let mut x = random.floats(rows * cols);
                let given = activations(&backend, &mut x, &[rows, cols]);
                let want = reference::linear(&x, &plain, cols, Some(&bias));
                let what = || format!("{dtype:?} {rows}x{cols}x{out}");
                let got = backend.logits(&given, &packed).unwrap();
                assert_close(&values(&got), &want, 2e-5 * (cols as f32).sqrt(), what);
                let got = backend.linear(&given, &packed).unwrap();
                assert_eq!(got.dims(), [rows, out]);
                let tolerance = grain(dtype).max(2e-5 * (cols as f32).sqrt());
                assert_close(&values(&got), &want, tolerance, what);
            }
        }
    }
}

/// What a bench compares with.
#[test]
fn sums_that_depend_on_the_batch_match_the_reference() {
    let mut random = Random::new(21);
    let backend = Backend::cuda_with_free_sums(0, DType::BFloat16).unwrap();
    for encoding in [Encoding::BF16, Encoding::Q4_1] {
        let (cols, outs) = (2560, 33);
        let weight = stored(&mut random, &[outs, cols], encoding);
        let plain = reference::numbers(&weight);
        let packed = backend.pack(&[weight], None).unwrap();
        for rows in [1, 20, 70] {
            let mut x = random.floats(rows * cols);
            let given = activations(&backend, &mut x, &[rows, cols]);
            let got = values(&backend.logits(&given, &packed).unwrap());
            let want = reference::linear(&x, &plain, cols, None);
            assert_close(&got, &want, 1e-3, || format!("{encoding:?} {rows} rows"));
        }
    }
}

#[test]
fn weights_of_every_encoding_stack() {
    let mut random = Random::new(2);
    for dtype in DTYPES {
        let backend = gpu(dtype);
        let encodings =
            [Encoding::F32, Encoding::F16, Encoding::BF16, Encoding::Q4_0, Encoding::Q4_1]
                .into_iter()
                .chain([Encoding::Q8_0]);
        let parts: Vec<_> = encodings
            .zip([5, 32, 33, 17, 64, 3])
            .map(|(e, out)| stored(&mut random, &[out, 64], e))
            .collect();
        let plain: Vec<f32> =
            parts.iter().flat_map(|part| values(&backend.vector(part).unwrap())).collect();
        let mut x = random.floats(2 * 64);
        let given = activations(&backend, &mut x, &[2, 64]);
        let packed = backend.pack(&parts, None).unwrap();
        let got = values(&backend.linear(&given, &packed).unwrap());
        assert_close(&got, &reference::linear(&x, &plain, 64, None), 8.0 * grain(dtype), || {
            format!("{dtype:?}")
        });
    }
}

const QUANTISED: [Encoding; 3] = [Encoding::Q8_0, Encoding::Q4_0, Encoding::Q4_1];

#[test]
fn quantised_linear_matches_the_reference() {
    let mut random = Random::new(11);
    for (dtype, encoding) in DTYPES.into_iter().flat_map(|d| QUANTISED.map(|e| (d, e))) {
        let backend = gpu(dtype);
        for (cols, outs) in [(32, 1), (96, 40), (160, 16), (2560, 24)] {
            let weight = stored(&mut random, &[outs, cols], encoding);
            let plain = reference::numbers(&weight);
            let packed = backend.pack(&[weight], None).unwrap();
            for rows in [1, 9, 17, 40, 70] {
                let mut x = random.floats(rows * cols);
                let given = activations(&backend, &mut x, &[rows, cols]);
                let want = reference::linear(&x, &plain, cols, None);
                // The weights themselves are not rounded: only the order of the sums differs.
                let tolerance = 2e-5 * (cols as f32).sqrt();
                assert_close(
                    &values(&backend.logits(&given, &packed).unwrap()),
                    &want,
                    tolerance,
                    || format!("{dtype:?} {encoding:?} {rows}x{cols}x{outs}"),
                );
            }
        }
    }
}

#[test]
fn a_row_of_linear_does_not_depend_on_its_batch() {
    let mut random = Random::new(3);
    // Large blocks, several of rows and of outs, for the multiprocessors, of which the emulated GPU has four;
    // columns that are no whole slices, of dense weights also no whole chunks.
    let (rows, outs) = if cfg!(feature = "cuda-emulator") { (250, 260) } else { (1700, 1700) };
    for dtype in DTYPES {
        for (encoding, cols) in
            [(Encoding::F32, 360)].into_iter().chain(QUANTISED.map(|q| (q, 352)))
        {
            check_rows(&mut random, (dtype, encoding), (rows, cols, outs));
            // Small blocks; of dense weights half tiles for few rows.
            check_rows(&mut random, (dtype, encoding), (rows, cols, 40));
        }
        // Slices of more than one step.
        check_rows(&mut random, (dtype, Encoding::F32), (rows, 8328, 9));
    }
}

fn check_rows(
    random: &mut Random,
    (dtype, encoding): (DType, Encoding),
    (rows, cols, outs): (usize, usize, usize),
) {
    let backend = gpu(dtype);
    let packed = backend.pack(&[stored(random, &[outs, cols], encoding)], None).unwrap();
    let x = activations(&backend, &mut random.floats(rows * cols), &[rows, cols]);
    // By gemm; below also as few rows.
    let whole = bits(&backend.logits(&x, &packed).unwrap());
    for (start, len) in [
        (0, 1),
        (249, 1),
        (5, 2),
        (3, 8),
        (11, 9),
        (100, 17),
        (20, 33),
        (2, 64),
        (7, 65),
        (150, 80),
    ] {
        let part = bits(&backend.logits(&x.narrow(0, start, len).unwrap(), &packed).unwrap());
        let same = part == whole[start * outs..(start + len) * outs];
        assert!(same, "{dtype:?} {encoding:?} rows {start}+{len}");
    }
}

#[test]
fn gates_in_a_linear_layer_are_those_after_it() {
    let mut random = Random::new(14);
    for (dtype, encoding) in
        DTYPES.into_iter().flat_map(|d| [Encoding::F32, Encoding::Q8_0].map(|e| (d, e)))
    {
        let backend = gpu(dtype);
        for (cols, width) in [(32, 4), (160, 24), (1056, 140)] {
            let parts = [(); 2].map(|()| stored(&mut random, &[width, cols], encoding));
            let bias = (width != 24).then(|| random.floats(2 * width));
            let packed = backend.pack(&parts, bias).unwrap();
            for rows in [1, 9, 20, 70] {
                let x = activations(&backend, &mut random.floats(rows * cols), &[rows, cols]);
                let both = backend.linear(&x, &packed).unwrap();
                let want = backend.gated_activation(&both, Activation::Silu).unwrap();
                #[cfg(feature = "cuda-emulator")]
                let before = emulator::count(c"launches");
                let got = backend.gated_linear(&x, &packed, Activation::Silu).unwrap();
                let what = format!("{dtype:?} {encoding:?} {rows}x{cols}x{width}");
                #[cfg(feature = "cuda-emulator")]
                {
                    // The others are two kernels, and compared with themselves.
                    let is_exact = dtype == DType::Float32;
                    let one = !is_exact && encoding == Encoding::F32 && width > 8 && rows < 70;
                    let launches = emulator::count(c"launches") - before;
                    assert_eq!(launches, if one { 1 } else { 2 }, "{what}");
                }
                assert_eq!(bits(&got), bits(&want), "{what}");
            }
        }
    }
}
