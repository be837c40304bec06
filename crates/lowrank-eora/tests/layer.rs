//! Repairing one layer, from activations to stored factors.

use candle_core::{DType, Device, Result, Tensor};
use faer::{Mat, MatRef};
use lowrank_eora::repair::layer::{
    Accumulation, Collect, InputCollector, InputStats, LowRank, Method, Options, OutputCollector,
    Rows, Weighting, solve,
};

const OUTPUTS: usize = 48;
const INPUTS: usize = 64;
const TOKENS: usize = 900;

/// Numbers in [−1, 1) that repeat no pattern of these sizes.
fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    (0..count)
        .map(|_| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

fn layer() -> Result<(Tensor, Tensor)> {
    let weight = Tensor::from_vec(
        numbers(OUTPUTS * INPUTS, 1),
        (OUTPUTS, INPUTS),
        &Device::Cpu,
    )?;
    let compressed = ((&weight * 3.0)?.round()? / 3.0)?;
    Ok((weight, compressed))
}

/// Activations `[tokens, inputs]` with falling scales.
fn activations(seed: u64) -> Result<Tensor> {
    let scales: Vec<f32> = (0..INPUTS).map(|j| 4.0 / (1 + j) as f32).collect();
    let x = Tensor::from_vec(
        numbers(TOKENS * INPUTS, seed),
        (TOKENS, INPUTS),
        &Device::Cpu,
    )?;
    let mix = Tensor::from_vec(numbers(INPUTS * INPUTS, 9), (INPUTS, INPUTS), &Device::Cpu)?;
    x.broadcast_mul(&Tensor::new(scales, &Device::Cpu)?)?
        .matmul(&mix)
}

/// D = W − W_c.
fn residual(weight: &Tensor, compressed: &Tensor) -> Result<Mat<f64>> {
    let d = (weight.to_dtype(DType::F64)? - compressed.to_dtype(DType::F64)?)?;
    let values: Vec<f64> = d.flatten_all()?.to_vec1()?;
    Ok(MatRef::from_row_major_slice(&values, OUTPUTS, INPUTS).to_owned())
}

fn statistics(x: &Tensor) -> InputStats {
    let collect = Collect {
        gram: true,
        cross: false,
    };
    let mut collector = InputCollector::new(INPUTS, collect, Accumulation::Sum).expect("valid");
    for batch in x.chunk(4, 0).expect("splits") {
        let rows = Rows::from_tensor(&batch).expect("finite");
        collector.update(&rows, None).expect("same width");
    }
    collector.finish()
}

/// Loss on tokens, computed by candle alone.
fn loss(
    weight: &Tensor,
    compressed: &Tensor,
    factors: Option<(&Tensor, &Tensor)>,
    x: &Tensor,
) -> Result<f32> {
    let dense = x.matmul(&weight.t()?)?;
    let mut repaired = x.matmul(&compressed.t()?)?;
    if let Some((a, b)) = factors {
        repaired = (repaired + x.matmul(&a.t()?)?.matmul(&b.t()?)?)?;
    }
    let error = (dense - repaired)?.sqr()?.sum_all()?.to_scalar::<f32>()?;
    Ok(error.sqrt())
}

#[test]
fn stored_factors_repair_unseen_tokens_and_eora_more_than_its_baselines() {
    let (weight, compressed) = layer().expect("a layer");
    let (seen, unseen) = (activations(2).expect("x"), activations(3).expect("x"));
    let stats = statistics(&seen);
    let repaired = |method: &str| {
        let method: Method = method.parse().expect("a name");
        let options = Options::default();
        let solution = method.solve_tensors(&weight, &compressed, &stats, 8, &options);
        let factors = solution.expect("solves").factors;
        let (a, b) = factors.to_tensors(DType::F16, &Device::Cpu).expect("fits");
        assert_eq!(
            (a.dims(), b.dims()),
            ([8, INPUTS].as_slice(), [OUTPUTS, 8].as_slice())
        );
        let (a, b) = (
            a.to_dtype(DType::F32).expect("f32"),
            b.to_dtype(DType::F32).expect("f32"),
        );
        loss(&weight, &compressed, Some((&a, &b)), &unseen).expect("runs")
    };
    let none = loss(&weight, &compressed, None, &unseen).expect("runs");
    let eora = repaired("eora");
    assert!(eora < 0.8 * none, "{eora} of {none}");
    for baseline in ["svd", "act-scale", "act-scale-sqrt", "diag", "lqer"] {
        let other = repaired(baseline);
        assert!(
            eora < other && other < none,
            "{baseline}: {other}, eora {eora}, none {none}"
        );
    }
}

#[test]
fn a_wide_layer_is_repaired_from_its_outputs_alone() {
    let (weight, compressed) = layer().expect("a layer");
    let x = activations(2).expect("x");
    let d = residual(&weight, &compressed).expect("shapes fit");
    let mut collector = OutputCollector::new(d.as_ref()).expect("finite");
    collector
        .update(&Rows::from_tensor(&x).expect("finite"))
        .expect("same width");
    let g = collector.finish();
    let stats = statistics(&x);
    let h = stats.gram.as_ref().expect("collected");
    let by = |weighting| solve(d.as_ref(), &weighting, 8, &Options::default()).expect("solves");
    let (streamed, direct) = (
        by(Weighting::Output(g.matrix())),
        by(Weighting::Gram(h.matrix())),
    );
    let relative = (streamed.loss() - direct.loss()).abs() / direct.loss();
    assert!(relative < 1e-5, "{relative}");
    let (a, b) = streamed
        .factors
        .to_tensors(DType::F32, &Device::Cpu)
        .expect("fits");
    let found = loss(&weight, &compressed, Some((&a, &b)), &x).expect("runs");
    assert!((f64::from(found) / streamed.loss() - 1.0).abs() < 1e-4);
    let back = LowRank::from_tensors(&a, &b).expect("finite");
    assert_eq!(back.rank(), 8);
}

#[test]
fn a_tensor_that_does_not_fit_is_named() {
    let (weight, _) = layer().expect("a layer");
    let other = weight.narrow(0, 0, OUTPUTS - 1).expect("narrower");
    let stats = statistics(&activations(2).expect("x"));
    let error = Method::Eora
        .solve_tensors(&weight, &other, &stats, 8, &Options::default())
        .expect_err("shapes differ")
        .to_string();
    assert_eq!(
        error,
        "compressed weight has shape [47, 64], expected [48, 64]"
    );
    let error = Rows::from_tensor(&(weight.log().expect("logs"))).expect_err("logs of negatives");
    assert!(
        error
            .to_string()
            .starts_with("activation of token 0, channel"),
        "{error}"
    );
}
