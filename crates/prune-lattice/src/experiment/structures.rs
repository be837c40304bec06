//! Networks whose connections are random graphs, trained from fresh weights: which properties of the graph go with accuracy?
//! After arXiv 2407.20601, with graphs as fixed masks of one recurrent layer, an input that does not depend on the graph, and
//! all sinks read out.

use super::run::fresh;
use crate::{
    cell::Cell,
    connectivity::pearson,
    error::{Error, Result},
    graph::{Graph, GraphProperties, barabasi_albert, erdos_renyi, watts_strogatz},
    names::{named, with},
    rnn::{RnnConfig, TrainConfig, evaluate, train},
    seed,
    tasks::{Sizes, Task},
    wiring::Wiring,
};
use rand::Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use tensor_io::{NoProgress, Progress};

named! {
    /// What connections are drawn from.
    pub enum Structure as "structure" {
        /// Watts–Strogatz graphs.
        WattsStrogatz = "ws",
        /// Barabási–Albert graphs.
        BarabasiAlbert = "ba",
        /// Erdős–Rényi graphs with as many edges as the Barabási–Albert graph of the same number.
        ErdosRenyi = "er",
        /// Control: a stack of equal layers, as many as that graph has, with about as many connections.
        Stack = "stack",
    }
}

/// What to draw and train.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct StructureConfig {
    /// Task.
    pub task: Task,
    /// Cell.
    pub cell: Cell,
    /// What is drawn.
    pub structures: Vec<Structure>,
    /// Graphs of each structure.
    pub graphs: usize,
    /// Smallest and largest number of neurons.
    pub neurons: (usize, usize),
    /// Rewiring probability of Watts–Strogatz graphs; 1 is what arXiv 2407.20601 used.
    pub rewire: f64,
    /// For graphs, weights and data.
    pub seed: u64,
    /// Sizes of the splits; `None`: the task's.
    pub sizes: Option<Sizes>,
    /// Training; `None`: the task's.
    pub training: Option<TrainConfig>,
}

with!(StructureConfig);

impl StructureConfig {
    /// All structures with 10 to 50 neurons, 20 graphs of each.
    pub fn new(task: Task, cell: Cell) -> Self {
        Self {
            task,
            cell,
            structures: Structure::ALL.to_vec(),
            graphs: 20,
            neurons: (10, 50),
            rewire: 1.0,
            seed: 0,
            sizes: None,
            training: None,
        }
    }
}

/// One trained network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StructureRow {
    /// What its connections were drawn from.
    pub structure: Structure,
    /// Number of the graph.
    pub graph: usize,
    /// Properties of the graph; absent for stacks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub properties: Option<GraphProperties>,
    /// Neurons.
    pub neurons: usize,
    /// Recurrent connections.
    pub connections: usize,
    /// Share of right answers on the test split; absent for regression.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// Mean loss on the test split.
    pub loss: f64,
}

/// Graph `number` of a structure: the sizes of arXiv 2407.20601, `n / 5` neighbours (an even number) or `n / 10` edges a vertex.
fn draw(structure: Structure, number: usize, config: &StructureConfig) -> Result<Graph> {
    let (low, high) = config.neurons;
    if low < 4 || high < low {
        return Err(Error::Setting {
            setting: "neurons",
            reason: format!("{low} to {high}; at least 4 are needed"),
        });
    }
    let number = number as u64;
    let n = seed::numbered(config.seed, "structure sizes", number).random_range(low..=high);
    let mut rng = seed::numbered(config.seed, &format!("structure {structure}"), number);
    let per_vertex = (n / 10).max(1);
    match structure {
        Structure::WattsStrogatz => watts_strogatz(n, (n / 5 / 2).max(1), config.rewire, &mut rng),
        Structure::BarabasiAlbert | Structure::Stack => {
            let purpose = format!("structure {}", Structure::BarabasiAlbert);
            let mut rng = seed::numbered(config.seed, &purpose, number);
            barabasi_albert(n, per_vertex, &mut rng)
        }
        Structure::ErdosRenyi => erdos_renyi(n, per_vertex * (n - per_vertex), &mut rng),
    }
}

/// Layers of equal size, as many as the wiring has, with about as many connections.
fn stack_like(wiring: &Wiring) -> Result<Wiring> {
    let layers = wiring.extra_steps() + 1;
    let blocks = 2 * layers - 1;
    let width = (wiring.edges().count() as f64 / blocks as f64)
        .sqrt()
        .round();
    Wiring::bottom_up(&vec![(width as usize).max(1); layers])
}

/// Draws and trains all networks. A step of `progress` is one of them.
///
/// # Errors
/// Settings that cannot be carried out, a diverging run, or [`Error::Cancelled`].
pub fn run_structures(
    config: &StructureConfig,
    progress: &dyn Progress,
) -> Result<Vec<StructureRow>> {
    let jobs: Vec<(Structure, usize)> = config
        .structures
        .iter()
        .flat_map(|&s| (0..config.graphs).map(move |k| (s, k)))
        .collect();
    progress.begin("training on graphs", jobs.len() as u64);
    jobs.into_par_iter()
        .map(|(structure, number)| {
            let graph = draw(structure, number, config)?;
            let mut wiring = Wiring::of_graph(&graph);
            if structure == Structure::Stack {
                wiring = stack_like(&wiring)?;
            }
            let sizes = config.sizes.unwrap_or(config.task.default_sizes());
            let data = config
                .task
                .generate(sizes, config.seed)?
                .with_extra_steps(wiring.extra_steps())?;
            let shape = RnnConfig::new(config.cell, data.input, [wiring.len()], data.outputs);
            let own = config.seed.wrapping_add(number as u64);
            let mut rnn = fresh(shape, &config.task, own)?;
            let masks = wiring.masks(&rnn)?;
            let training = config.training.clone();
            let training = training
                .unwrap_or(config.task.default_training(config.cell))
                .with(|c| c.seed = own);
            train(&mut rnn, &data, &training, &masks, &NoProgress)?;
            let test = evaluate(&rnn, &data.test)?;
            progress.advance(1)?;
            Ok(StructureRow {
                structure,
                graph: number,
                properties: (structure != Structure::Stack).then(|| GraphProperties::of(&graph)),
                neurons: wiring.len(),
                connections: wiring.edges().count(),
                accuracy: test.accuracy,
                loss: test.loss,
            })
        })
        .collect()
}

/// How a property of graphs goes with the quality of the networks on them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Property {
    /// Its name.
    pub name: &'static str,
    /// Pearson's r with accuracy (with the negative loss, for regression); absent where one of them does not vary.
    pub r: Option<f64>,
    /// Networks.
    pub networks: usize,
}

/// Pearson's r of every graph property with quality, over the rows that have properties.
pub fn correlations(rows: &[StructureRow]) -> Vec<Property> {
    type Read = fn(&GraphProperties) -> f64;
    let properties: [(&'static str, Read); 14] = [
        ("layers", |p| p.layers as f64),
        ("nodes", |p| p.nodes as f64),
        ("edges", |p| p.edges as f64),
        ("sources", |p| p.sources as f64),
        ("sinks", |p| p.sinks as f64),
        ("diameter", |p| p.diameter as f64),
        ("density", |p| p.density),
        ("average path", |p| p.average_path),
        ("variance of eccentricity", |p| p.eccentricity.variance),
        ("variance of degree", |p| p.degree.variance),
        ("variance of closeness", |p| p.closeness.variance),
        ("variance of node betweenness", |p| {
            p.node_betweenness.variance
        }),
        ("variance of edge betweenness", |p| {
            p.edge_betweenness.variance
        }),
        ("mean degree", |p| p.degree.mean),
    ];
    let with: Vec<(&GraphProperties, f64)> = rows
        .iter()
        .filter_map(|row| Some((row.properties.as_ref()?, row.accuracy.unwrap_or(-row.loss))))
        .collect();
    properties
        .into_iter()
        .map(|(name, read)| {
            let pairs: Vec<(f64, f64)> = with.iter().map(|(p, q)| (read(p), *q)).collect();
            Property {
                name,
                r: pearson(&pairs),
                networks: pairs.len(),
            }
        })
        .collect()
}
