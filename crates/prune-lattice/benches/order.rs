//! Cost of the order core on random acyclic digraphs, one thread, beside petgraph on the same question, and of a whole
//! 16-cut persistence run.
//!
//! `cargo bench -p prune-lattice --bench order`

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use petgraph::{
    algo::{
        condensation,
        tred::{dag_to_toposorted_adjacency_list, dag_transitive_reduction_closure},
    },
    graph::DiGraph,
    visit::IntoNeighbors,
};
use prune_lattice::{
    influence::Influence,
    order::{
        Criterion as Order, OrderMode, Poset, bits::BitMatrix, context::irreducible_rows,
        default_cuts, persistence, scc::components,
    },
};
use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use std::{hint::black_box, time::Duration};

/// Edges along a hidden random order, with the given probability.
fn random_dag(n: usize, density: f64) -> BitMatrix {
    let mut rng = ChaCha8Rng::seed_from_u64(n as u64);
    let mut rank: Vec<usize> = (0..n).collect();
    rank.shuffle(&mut rng);
    BitMatrix::from_fn(n, n, |i, j| rank[i] < rank[j] && rng.random_bool(density))
}

fn core(c: &mut Criterion) {
    for n in [128, 1024, 4096] {
        for percent in [2, 30] {
            let graph = random_dag(n, f64::from(percent) / 100.0);
            let poset = Poset::of_digraph(&graph);
            println!(
                "n = {n}, {percent} %: the two relations take {} bytes, n^2/4 = {}",
                poset.bytes(),
                n * n / 4
            );
            assert_eq!(poset.bytes(), n * n / 4);
            let mut group = c.benchmark_group(format!("n={n} density={percent}%"));
            group
                .sample_size(10)
                .measurement_time(Duration::from_secs(2))
                .warm_up_time(Duration::from_millis(300));
            group.bench_function("components", |b| b.iter(|| components(black_box(&graph))));
            group.bench_function("components + closure + transpose", |b| {
                b.iter(|| Poset::of_digraph(black_box(&graph)))
            });
            group.bench_function("transpose", |b| b.iter(|| black_box(&graph).transpose()));
            group.bench_function("meet-irreducible", |b| {
                b.iter(|| black_box(&poset).meet_irreducible())
            });
            let digraph = cyclic(n, percent);
            group.bench_function("context", |b| {
                b.iter(|| irreducible_rows(black_box(&digraph)))
            });
            group.finish();
        }
    }
}

/// A random digraph with cycles, for the context test.
fn cyclic(n: usize, percent: u32) -> BitMatrix {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    BitMatrix::from_fn(n, n, |i, j| {
        i != j && rng.random_bool(f64::from(percent) / 100.0)
    })
}

/// Condensation and closure by petgraph, then the same verdict (one irreducibility test per element) on its lists.
fn by_petgraph(graph: &DiGraph<(), ()>) -> usize {
    let dag = condensation(graph.clone(), true);
    let order = petgraph::algo::toposort(&dag, None).expect("a condensation is acyclic");
    let (list, _) = dag_to_toposorted_adjacency_list::<_, u32>(&dag, &order);
    let (reduction, closure) = dag_transitive_reduction_closure(&list);
    let n = order.len() as u32;
    let mut down = vec![Vec::new(); n as usize];
    for x in 0..n {
        down[x as usize].push(x);
        closure.neighbors(x).for_each(|y| down[y as usize].push(x));
    }
    (0..n)
        .filter(|&x| {
            let mut hits = vec![0u32; n as usize];
            let mut covers = 0;
            for y in reduction.neighbors(x) {
                covers += 1;
                down[y as usize].iter().for_each(|&z| hits[z as usize] += 1);
            }
            let meet = if covers == 0 {
                n as usize
            } else {
                hits.iter().filter(|&&h| h == covers).count()
            };
            meet != down[x as usize].len()
        })
        .count()
}

fn beside_petgraph(c: &mut Criterion) {
    let mut group = c.benchmark_group("reachability verdict");
    group
        .sample_size(10)
        .measurement_time(Duration::from_secs(3))
        .warm_up_time(Duration::from_millis(300));
    for (n, percent) in [(128, 2), (128, 30), (1024, 2), (1024, 30)] {
        let graph = random_dag(n, f64::from(percent) / 100.0);
        let mut theirs = DiGraph::<(), ()>::new();
        let nodes: Vec<_> = (0..n).map(|_| theirs.add_node(())).collect();
        for i in 0..n {
            graph.row_ones(i).for_each(|j| {
                theirs.add_edge(nodes[i], nodes[j], ());
            });
        }
        let ours = Poset::of_digraph(&graph)
            .meet_irreducible()
            .into_iter()
            .filter(|&m| m)
            .count();
        assert_eq!(ours, by_petgraph(&theirs), "both answer the same");
        let name = format!("n={n} density={percent}%");
        group.bench_with_input(BenchmarkId::new("this crate", &name), &graph, |b, g| {
            b.iter(|| Poset::of_digraph(g).meet_irreducible());
        });
        group.bench_with_input(BenchmarkId::new("petgraph", &name), &theirs, |b, g| {
            b.iter(|| by_petgraph(g))
        });
    }
    group.finish();
}

fn sixteen_cuts(c: &mut Criterion) {
    let mut group = c.benchmark_group("persistence over 16 cuts");
    group
        .sample_size(10)
        .measurement_time(Duration::from_secs(5))
        .warm_up_time(Duration::from_millis(300));
    for n in [128, 1024, 4096] {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let values: Vec<f32> = (0..n * n).map(|_| rng.random::<f32>()).collect();
        let influence = Influence::from_dense(n, &values).expect("a square matrix");
        for (name, mode) in [
            ("reachability", OrderMode::Reachability),
            ("context", OrderMode::Context),
        ] {
            group.bench_with_input(BenchmarkId::new(name, n), &influence, |b, a| {
                b.iter(|| persistence(a, &default_cuts(), Order::new(mode)));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, core, beside_petgraph, sixteen_cuts);
criterion_main!(benches);
