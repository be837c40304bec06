//! A mixture of experts with gradients.
//!
//! Which experts a token goes to is not differentiated; the gates are, so that the router learns how much to trust those
//! that it chose, and the balance, so that it comes to use them all.

use candle_core::{D, Tensor};

use crate::Result;

/// What the experts of a layer put out.
pub(super) struct Experts {
    /// `[tokens, hidden]`.
    pub(super) output: Tensor,
    /// E Σ f p, a scalar.
    pub(super) balance: Tensor,
}

/// Sends each row of `x`, `[tokens, hidden]`, through the `chosen` experts of the highest logits; gates are the softmax
/// over these.
pub(super) fn mixture(
    x: &Tensor,
    router: &Tensor,
    chosen: usize,
    expert: impl Fn(usize, &Tensor) -> Result<Tensor>,
) -> Result<Experts> {
    let experts = router.dim(0)?;
    let probabilities = candle_nn::ops::softmax(&x.matmul(&router.t()?)?, D::Minus1)?;
    let ids: Vec<u32> = probabilities
        .to_vec2::<f32>()?
        .iter()
        .flat_map(|row| highest(row, chosen))
        .collect();
    let tokens = ids.len() / chosen;
    let shape = (tokens, chosen);
    let places = Tensor::from_vec(ids.clone(), shape, x.device())?;
    let gates = probabilities.gather(&places, 1)?;
    let gates = gates.broadcast_div(&gates.sum_keepdim(1)?)?.flatten_all()?;
    let mut output = x.zeros_like()?;
    let mut shares = vec![0f32; experts];
    for (id, share) in shares.iter_mut().enumerate() {
        let of_expert = ids.iter().enumerate();
        let slots: Vec<u32> = of_expert
            .filter(|&(_, &other)| other as usize == id)
            .map(|(slot, _)| slot as u32)
            .collect();
        if slots.is_empty() {
            continue;
        }
        *share = slots.len() as f32 / ids.len() as f32;
        let rows: Vec<u32> = slots.iter().map(|slot| slot / chosen as u32).collect();
        let rows = Tensor::new(rows, x.device())?;
        let gates = gates.index_select(&Tensor::new(slots, x.device())?, 0)?;
        let y = expert(id, &x.index_select(&rows, 0)?)?;
        let y = y.broadcast_mul(&gates.unsqueeze(1)?)?;
        output = output.index_add(&rows, &y, 0)?;
    }
    let shares = Tensor::new(shares, x.device())?;
    let balance = (probabilities.mean(0)? * shares)?.sum_all()?;
    Ok(Experts {
        output,
        balance: (balance * experts as f64)?,
    })
}

/// Numbers of the highest values, of equal ones the lower numbers.
fn highest(values: &[f32], count: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..values.len() as u32).collect();
    order.sort_by(|&a, &b| values[b as usize].total_cmp(&values[a as usize]));
    order.truncate(count);
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    fn random(shape: &[usize], seed: usize) -> Var {
        let count: usize = shape.iter().product();
        let values: Vec<f32> = (0..count)
            .map(|i| ((i * 37 + seed * 101) as f32 * 0.61).sin())
            .collect();
        Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu).unwrap()).unwrap()
    }

    fn run(x: &Tensor, router: &Tensor, chosen: usize, experts: &[Var]) -> Experts {
        let expert = |id: usize, x: &Tensor| Ok(x.matmul(experts[id].as_tensor())?);
        mixture(x, router, chosen, expert).unwrap()
    }

    #[test]
    fn with_all_experts_chosen_the_output_is_the_softmax_of_all() {
        let (x, router) = (random(&[5, 4], 1), random(&[3, 4], 2));
        let experts: Vec<Var> = (0..3).map(|e| random(&[4, 4], 5 + e)).collect();
        let found = run(&x, &router, 3, &experts)
            .output
            .to_vec2::<f32>()
            .unwrap();
        let logits = x.matmul(&router.t().unwrap()).unwrap();
        let gates = candle_nn::ops::softmax(&logits, 1).unwrap();
        let mut expected = x.zeros_like().unwrap();
        for (id, expert) in experts.iter().enumerate() {
            let y = x.matmul(expert.as_tensor()).unwrap();
            let gate = gates.narrow(1, id, 1).unwrap();
            expected = (expected + y.broadcast_mul(&gate).unwrap()).unwrap();
        }
        let expected = expected.to_vec2::<f32>().unwrap();
        for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
            assert!((found - expected).abs() < 1e-5);
        }
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let x = random(&[6, 4], 1);
        let router = random(&[4, 4], 2);
        let experts: Vec<Var> = (0..4).map(|e| random(&[4, 4], 5 + e)).collect();
        let weights = random(&[6, 4], 9);
        let loss = |router: &Tensor| {
            let Experts { output, balance } = run(&x, router, 2, &experts);
            let sum = (output * weights.as_tensor()).unwrap().sum_all().unwrap();
            (sum + balance).unwrap()
        };
        let gradients = loss(&router).backward().unwrap();
        let gradient = gradients.get(&router).unwrap().to_vec2::<f32>().unwrap();
        let values = router.to_vec2::<f32>().unwrap();
        for (row, column) in [(0, 1), (2, 3), (3, 0)] {
            let at = |change: f32| {
                let mut values = values.clone();
                values[row][column] += change;
                let router = Tensor::new(values, &Device::Cpu).unwrap();
                loss(&router).to_scalar::<f32>().unwrap()
            };
            let slope = (at(2e-3) - at(-2e-3)) / 4e-3;
            let found = gradient[row][column];
            assert!((found - slope).abs() < 2e-2, "{found} is not {slope}");
        }
    }

    #[test]
    fn equal_use_of_experts_has_a_balance_of_one() {
        // Four tokens along four axes, each choosing its own expert.
        let eye = Tensor::eye(4, candle_core::DType::F32, &Device::Cpu).unwrap();
        let experts: Vec<Var> = (0..4).map(|e| random(&[4, 4], e)).collect();
        let balance = run(&eye, &(&eye * 9.0).unwrap(), 1, &experts).balance;
        assert!((balance.to_scalar::<f32>().unwrap() - 1.0).abs() < 1e-5);
    }
}
