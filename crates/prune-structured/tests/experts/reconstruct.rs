//! Clusters of STUN that are averaged instead of keeping one of their members.

use super::common::{
    Mixture, config, decoder, gap, logits, options, tensors, windows, with_twins_and,
};
use candle_core::{DType, Device, Tensor};
use causal_lm::Decoder;
use causal_lm::names::ExpertLayout;
use prune_structured::experts::method::{Reconstruct, Representative, Stun, StunCompat};
use prune_structured::experts::{
    Aim, ExpertMethod, ExpertOptions, ExpertPlan, ExpertRecipe, Keep, Outcome, plan,
};
use prune_structured::{Error, NoProgress};
use serde_json::json;
use tensor_io::Checkpoint;

fn stun(reconstruct: Reconstruct) -> Stun {
    Stun {
        reconstruct,
        ..Stun::default()
    }
}

fn found(decoder: &Decoder<'_>, method: impl Into<ExpertMethod>, keep: usize) -> Outcome {
    let options = ExpertOptions::new(method, Keep::Experts(keep));
    plan(decoder, &windows(), &options, &NoProgress).unwrap()
}

/// For each expert that stays the members that it is the mean of; none where it is its own.
fn members(plan: &ExpertPlan, layer: usize) -> Vec<Vec<usize>> {
    let layer = plan.layers[layer].as_ref().unwrap();
    let ids = |members: &Vec<_>| members.iter().map(expert).collect();
    layer.members.iter().map(ids).collect()
}

fn expert(member: &prune_structured::experts::Member) -> usize {
    member.expert
}

/// Rows of a matrix of f32.
fn rows(tensor: &Tensor) -> Vec<Vec<f64>> {
    let rows = tensor.to_dtype(DType::F64).unwrap();
    rows.to_vec2().unwrap()
}

/// An expert's neurons: row of gate, row of up, column of down.
fn neurons(decoder: &Decoder<'_>, layer: usize, expert: usize) -> Vec<Vec<f64>> {
    let mlp = decoder.expert(layer, expert).unwrap();
    let gate = rows(&mlp.gate.unwrap().weight().unwrap());
    let up = rows(&mlp.up.weight().unwrap());
    let down = rows(&mlp.down.weight().unwrap().t().unwrap());
    let parts = gate.into_iter().zip(up).zip(down);
    parts.map(|((a, b), c)| [a, b, c].concat()).collect()
}

/// All orders of `count` things.
fn orders(count: usize) -> Vec<Vec<usize>> {
    if count == 0 {
        return vec![vec![]];
    }
    let mut all = vec![];
    for shorter in orders(count - 1) {
        for at in 0..count {
            let mut order = shorter.clone();
            order.insert(at, count - 1);
            all.push(order);
        }
    }
    all
}

/// The mean of experts whose neurons are in the order that is most similar to the first one's, by trying all orders.
fn mean(experts: &[Vec<Vec<f64>>], centre: usize) -> Vec<Vec<f64>> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    let centre = &experts[centre];
    let mut sum = vec![vec![0.0; centre[0].len()]; centre.len()];
    for expert in experts {
        let similar = |order: &Vec<usize>| -> f64 {
            let pairs = centre.iter().zip(order);
            pairs.map(|(a, &at)| dot(a, &expert[at])).sum()
        };
        let all = orders(centre.len());
        let best = all.iter().max_by(|a, b| similar(a).total_cmp(&similar(b)));
        for (sum, &at) in sum.iter_mut().zip(best.unwrap()) {
            for (sum, x) in sum.iter_mut().zip(&expert[at]) {
                *sum += x / experts.len() as f64;
            }
        }
    }
    sum
}

fn close(found: &[Vec<f64>], expected: &[Vec<f64>]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
        assert!((found - expected).abs() < 1e-6, "{found} is not {expected}");
    }
}

#[test]
fn averaged_clusters_are_the_means_of_aligned_experts_and_of_router_rows() {
    let narrow = json!({"intermediate_size": 4});
    for layout in [ExpertLayout::Alone, ExpertLayout::Fused] {
        let model = Mixture::random(&config("mixtral", narrow.clone()), layout);
        let dense = model.decoder();
        let mut averaged = 0;
        for (method, keep) in [
            (stun(Reconstruct::FewClusters), 2),
            (stun(Reconstruct::SmallClusters), 4),
        ] {
            let plan = found(&dense, method, keep).plan;
            let folder = model.written(&plan, &format!("{keep}"));
            let checkpoint = Checkpoint::open(&folder).unwrap();
            let merged = decoder(&checkpoint);
            for (layer, kept) in plan.layers.iter().enumerate() {
                let kept = &kept.as_ref().unwrap().kept;
                let name = |decoder: &Decoder<'_>| decoder.config().names.router(layer).unwrap();
                let router = |of: &Decoder<'_>| {
                    let router = of.checkpoint().tensor(&name(of), &Device::Cpu);
                    rows(&router.unwrap())
                };
                let (all, routed) = (router(&dense), router(&merged));
                for (at, members) in members(&plan, layer).iter().enumerate() {
                    let alone = [kept[at]];
                    let of = if members.is_empty() {
                        &alone[..]
                    } else {
                        members
                    };
                    averaged += usize::from(of.len() > 1);
                    let centre = of.iter().position(|e| *e == kept[at]).unwrap();
                    let experts: Vec<_> = of.iter().map(|&e| neurons(&dense, layer, e)).collect();
                    close(&neurons(&merged, layer, at), &mean(&experts, centre));
                    let mut row = vec![0.0; all[0].len()];
                    for &member in of {
                        let parts = row.iter_mut().zip(&all[member]);
                        parts.for_each(|(sum, x)| *sum += x / of.len() as f64);
                    }
                    close(&routed[at..=at], &[row]);
                }
            }
        }
        assert!(averaged >= 6, "{averaged}");
    }
}

#[test]
fn which_clusters_are_averaged_depends_on_their_size_or_on_their_number() {
    let model = Mixture::random(&config("mixtral", json!({})), ExpertLayout::Alone);
    let decoder = model.decoder();
    for keep in 2..6 {
        for which in [Reconstruct::FewClusters, Reconstruct::SmallClusters] {
            let of_stun = found(&decoder, stun(which), keep);
            let of_compat = StunCompat { stun: stun(which) };
            for outcome in [of_stun, found(&decoder, of_compat, keep)] {
                for layer in &outcome.layers {
                    let members = members(&outcome.plan, layer.layer);
                    let clusters = layer.clusters.iter().filter(|cluster| {
                        cluster.len() > 1
                            && match which {
                                Reconstruct::FewClusters => keep == 2,
                                _ => cluster.len() == 2,
                            }
                    });
                    let mut expected: Vec<Vec<usize>> = clusters.cloned().collect();
                    let mut made: Vec<Vec<usize>> =
                        members.into_iter().filter(|m| !m.is_empty()).collect();
                    expected.sort();
                    made.sort();
                    assert_eq!(made, expected, "{which:?} {keep}");
                }
            }
        }
    }
}

#[test]
fn without_averages_the_plan_is_that_of_a_kept_member() {
    let model = Mixture::random(&config("mixtral", json!({})), ExpertLayout::Alone);
    let decoder = model.decoder();
    for representative in [Representative::NearestToMean, Representative::Reap] {
        let method = Stun {
            representative,
            ..stun(Reconstruct::Never)
        };
        let never = found(&decoder, method, 3);
        let averaged = Stun {
            reconstruct: Reconstruct::SmallClusters,
            ..method
        };
        let averaged = found(&decoder, averaged, 3);
        for (never, averaged) in never.plan.layers.iter().zip(&averaged.plan.layers) {
            let (never, averaged) = (never.as_ref().unwrap(), averaged.as_ref().unwrap());
            assert!(never.members.iter().all(Vec::is_empty));
            assert_eq!(never.kept, averaged.kept);
        }
    }
    // Plans of earlier versions say nothing of averages.
    let plan = found(&decoder, stun(Reconstruct::Never), 3).plan;
    let mut json = serde_json::to_value(&plan).unwrap();
    let method = json["method"].as_object_mut().unwrap();
    assert_eq!(method.remove("reconstruct").unwrap(), "never");
    let path = model.path("plan.json");
    std::fs::write(&path, json.to_string()).unwrap();
    assert_eq!(ExpertPlan::load(&path).unwrap(), plan);
}

#[test]
fn equal_experts_with_equal_rows_give_the_same_expert() {
    let model = with_twins_and(ExpertLayout::Alone, |name, tensor| {
        if !name.ends_with("block_sparse_moe.gate.weight") {
            return tensor;
        }
        let rows = Tensor::new(vec![0u32, 0, 2, 3, 4, 5], &Device::Cpu).unwrap();
        tensor.index_select(&rows, 0).unwrap()
    });
    let dense = model.decoder();
    let averaged = found(&dense, stun(Reconstruct::SmallClusters), 5).plan;
    let kept = found(&dense, stun(Reconstruct::Never), 5).plan;
    for layer in 0..3 {
        assert!(members(&averaged, layer).contains(&vec![0, 1]));
    }
    let folders = [
        model.written(&averaged, "averaged"),
        model.written(&kept, "kept"),
    ];
    assert!(gap(&logits(&folders[0]), &logits(&folders[1])) < 1e-5);
    // Rows of experts that stand for themselves are the source's bytes.
    let [averaged, kept] = folders.map(|folder| tensors(&folder));
    let router = |tensors: &[(String, Vec<u8>)]| {
        let mut routers = tensors
            .iter()
            .filter(|(name, _)| name.ends_with("moe.gate.weight"));
        routers.next().unwrap().1.clone()
    };
    assert_eq!(router(&averaged), router(&kept));
}

#[test]
fn a_layer_behind_averaged_ones_sees_what_the_written_model_gives_it() {
    let model = Mixture::random(&config("qwen3_moe", json!({})), ExpertLayout::Fused);
    let dense = model.decoder();
    let options = ExpertOptions::new(stun(Reconstruct::SmallClusters), Keep::Experts(5));
    let behind = options.progressive(true);
    let outcome = plan(&dense, &windows(), &behind, &NoProgress).unwrap();
    assert!(members(&outcome.plan, 0).iter().any(|m| m.len() == 2));
    let mut first = ExpertPlan::whole(&dense);
    first.layers[0] = outcome.plan.layers[0].clone();
    let folder = model.written(&first, "first");
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let smaller = decoder(&checkpoint);
    let seen = plan(&smaller, &windows(), &options, &NoProgress).unwrap();
    let experts = |outcome: &Outcome| outcome.layers[1].statistics.experts.clone();
    for (found, expected) in experts(&seen).iter().zip(experts(&outcome)) {
        assert_eq!(found.count, expected.count);
        assert!((found.norms - expected.norms).abs() <= 1e-5 * expected.norms);
    }
}

#[test]
fn rows_say_what_is_averaged_and_what_cannot_be_is_refused_beforehand() {
    let named = |name: &str| ExpertRecipe::named(name, 0).unwrap();
    let few = named("stun-reap").reconstruct(Reconstruct::FewClusters);
    assert_eq!(few.name, "stun-reap+averaged-few-clusters");
    assert!(few.reconstructs());
    let never = named("stun").reconstruct(Reconstruct::Never);
    assert_eq!(never, named("stun"));
    let reap = named("reap").reconstruct(Reconstruct::FewClusters);
    assert_eq!(reap, named("reap"));
    assert!(!reap.reconstructs());
    let model = Mixture::random(&config("mixtral", json!({})), ExpertLayout::Alone);
    let decoder = model.decoder();
    assert!(few.check(&decoder, Aim::Ratio(0.5)).is_ok());
    let scale = prune_structured::experts::compensation::ExpertScale::default();
    let refused = few.compensation(scale).check(&decoder, Aim::Ratio(0.5));
    let method = "a compensation beside averaged experts";
    assert!(matches!(refused, Err(Error::Unsupported { method: m, .. }) if m == method));
    // Other methods are as they were.
    let plain = options("reap", Keep::Experts(3));
    assert!(plan(&decoder, &windows(), &plain, &NoProgress).is_ok());
}
