//! Verdicts at one cut, and their persistence over many.

use super::{
    Cut, Diagnostics, LARGEST_CLASS_LIMIT, OrderMode, Poset, Verdict,
    bits::{self, BitMatrix},
    context, orient, thresholds,
};
use crate::{
    error::{Error, Result},
    influence::Influence,
};
use serde::{Deserialize, Serialize};

/// Which neurons must have strong edges for their verdict to count. An isolated neuron is a maximal element and so
/// meet-irreducible; counting it keeps exactly the neurons that do nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Connected {
    /// None: the literal reading, isolated neurons count.
    No,
    /// A strong edge in or out.
    InOrOut,
    /// A strong edge in and one out.
    #[default]
    InAndOut,
}

/// An order and the verdict asked of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Criterion {
    /// How the digraph becomes an order.
    pub mode: OrderMode,
    /// Which irreducible elements count.
    pub verdict: Verdict,
    /// Which neurons may count.
    pub connected: Connected,
}

impl Criterion {
    /// Meet-irreducible and connected in and out, under the given mode.
    pub fn new(mode: OrderMode) -> Self {
        Self {
            mode,
            verdict: Verdict::default(),
            connected: Connected::default(),
        }
    }
}

/// The verdicts at one cut.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdicts {
    /// Per neuron: irreducible, and connected as the criterion asks.
    pub kept: Vec<bool>,
    /// What the order looked like.
    pub report: CutReport,
}

/// One cut of a persistence run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CutReport {
    /// The cut.
    pub cut: Cut,
    /// Its threshold, in units of the influence.
    pub threshold: f32,
    /// Edges that it lets in.
    pub edges: usize,
    /// Edges per neuron.
    pub mean_out_degree: f64,
    /// The order.
    pub order: Diagnostics,
}

impl Verdicts {
    /// These verdicts, unless the order is degenerate.
    ///
    /// # Errors
    /// [`Error::DegenerateOrder`].
    pub fn discriminating(self) -> Result<Self> {
        if self.report.order.degenerate {
            Err(degenerate(&self.report.order))
        } else {
            Ok(self)
        }
    }
}

pub(crate) fn degenerate(order: &Diagnostics) -> Error {
    Error::DegenerateOrder {
        neurons: order.neurons,
        classes: order.classes,
        largest: order.largest_class,
        irreducible: order.irreducible_neurons,
    }
}

/// The verdict of every neuron at one cut: the binary variant of the method.
///
/// # Errors
/// A cut that cannot be carried out. A degenerate order is reported, not refused; see [`Verdicts::discriminating`].
pub fn verdicts(influence: &Influence, cut: Cut, criterion: Criterion) -> Result<Verdicts> {
    let threshold = thresholds(influence, &[cut])?[0];
    Ok(verdicts_at(
        influence,
        influence.digraph(threshold),
        cut,
        threshold,
        criterion,
    ))
}

fn verdicts_at(
    influence: &Influence,
    graph: BitMatrix,
    cut: Cut,
    threshold: f32,
    criterion: Criterion,
) -> Verdicts {
    let n = graph.rows();
    let sources = graph.transpose();
    let (irreducible, mut order) = match criterion.mode {
        OrderMode::Context => context_verdicts(&graph, &sources, criterion.verdict),
        OrderMode::Reachability => poset_verdicts(&graph, criterion.verdict),
        OrderMode::Oriented(by) => {
            poset_verdicts(&orient::oriented(influence, &graph, by), criterion.verdict)
        }
    };
    order.degenerate |=
        order.classes == 1 || order.irreducible_neurons == 0 || order.irreducible_neurons == n;
    let kept = (0..n)
        .map(|x| {
            let (out, into) = (
                bits::lowest(graph.row(x)).is_some(),
                bits::lowest(sources.row(x)).is_some(),
            );
            irreducible[x]
                && match criterion.connected {
                    Connected::No => true,
                    Connected::InOrOut => out || into,
                    Connected::InAndOut => out && into,
                }
        })
        .collect();
    let edges = graph.count();
    let report = CutReport {
        cut,
        threshold,
        edges,
        mean_out_degree: edges as f64 / n as f64,
        order,
    };
    Verdicts { kept, report }
}

fn combine(
    verdict: Verdict,
    meet: impl FnOnce() -> Vec<bool>,
    join: impl FnOnce() -> Vec<bool>,
) -> Vec<bool> {
    match verdict {
        Verdict::Meet => meet(),
        Verdict::Join => join(),
        Verdict::Both => meet()
            .into_iter()
            .zip(join())
            .map(|(m, j)| m && j)
            .collect(),
    }
}

fn count(flags: &[bool]) -> usize {
    flags.iter().filter(|&&f| f).count()
}

fn context_verdicts(
    graph: &BitMatrix,
    sources: &BitMatrix,
    verdict: Verdict,
) -> (Vec<bool>, Diagnostics) {
    let irreducible = combine(
        verdict,
        || context::irreducible_rows_with(graph, sources),
        || context::irreducible_rows_with(sources, graph),
    );
    let (classes, largest_class) = context::row_classes(if verdict == Verdict::Join {
        sources
    } else {
        graph
    });
    let positive = count(&irreducible);
    let order = Diagnostics {
        neurons: graph.rows(),
        classes,
        largest_class,
        irreducible_classes: positive,
        irreducible_neurons: positive,
        degenerate: false,
    };
    (irreducible, order)
}

fn poset_verdicts(graph: &BitMatrix, verdict: Verdict) -> (Vec<bool>, Diagnostics) {
    let poset = Poset::of_digraph(graph);
    let per_class = combine(
        verdict,
        || poset.meet_irreducible(),
        || poset.join_irreducible(),
    );
    let irreducible = poset.per_neuron(&per_class);
    let n = graph.rows();
    let largest_class = poset.classes().sizes.iter().copied().max().unwrap_or(0);
    let order = Diagnostics {
        neurons: n,
        classes: poset.len(),
        largest_class,
        irreducible_classes: count(&per_class),
        irreducible_neurons: count(&irreducible),
        degenerate: largest_class as f64 > LARGEST_CLASS_LIMIT * n as f64,
    };
    (irreducible, order)
}

/// The share of cuts at which each neuron counts: the continuous variant of the method.
#[derive(Debug, Clone, PartialEq)]
pub struct Persistence {
    /// Per neuron, in `[0, 1]`: positive verdicts over the cuts that were not degenerate.
    pub share: Vec<f64>,
    /// Every cut, degenerate or not.
    pub cuts: Vec<CutReport>,
}

impl Persistence {
    /// Number of cuts whose order told neurons apart.
    pub fn discriminating_cuts(&self) -> usize {
        self.cuts.iter().filter(|c| !c.order.degenerate).count()
    }
}

/// Verdicts over all cuts. Cuts with a degenerate order say nothing about single neurons and are left out of the share.
///
/// # Errors
/// [`Error::DegenerateOrder`] when every cut is degenerate or all neurons have the same share; a cut that cannot be carried
/// out.
pub fn persistence(
    influence: &Influence,
    cuts: &[Cut],
    criterion: Criterion,
) -> Result<Persistence> {
    let mut share = vec![0.0; influence.len()];
    let mut reports = Vec::with_capacity(cuts.len());
    let mut counted = 0usize;
    let cut_at = thresholds(influence, cuts)?;
    let edges = Edges::of(influence, &cut_at);
    for (&cut, threshold) in cuts.iter().zip(cut_at) {
        let graph = edges.digraph(influence, threshold);
        let Verdicts { kept, report } = verdicts_at(influence, graph, cut, threshold, criterion);
        if !report.order.degenerate {
            counted += 1;
            share
                .iter_mut()
                .zip(&kept)
                .for_each(|(s, &k)| *s += f64::from(u8::from(k)));
        }
        reports.push(report);
    }
    share.iter_mut().for_each(|s| *s /= counted.max(1) as f64);
    if share.iter().all(|s| *s == share[0]) {
        let Some(last) = reports.iter().min_by_key(|r| r.order.largest_class) else {
            return Err(Error::Setting {
                setting: "cuts",
                reason: "there are none".into(),
            });
        };
        return Err(degenerate(&last.order));
    }
    Ok(Persistence {
        share,
        cuts: reports,
    })
}

/// The edges that the lowest of several thresholds lets in, so that not every cut reads the whole matrix again. `None` where
/// they are too many for a list to be worth it.
struct Edges(Option<Vec<(f32, u32, u32)>>);

/// Share of all pairs up to which edges are listed.
const LISTED: usize = 16;

impl Edges {
    fn of(influence: &Influence, thresholds: &[f32]) -> Self {
        let n = influence.len();
        let lowest = thresholds.iter().copied().fold(f32::INFINITY, f32::min);
        let mut list = Vec::new();
        for j in 0..n {
            let row = influence.row(j).iter().zip(0u32..);
            list.extend(
                row.filter(|(v, _)| **v >= lowest && **v > 0.0)
                    .map(|(v, i)| (*v, j as u32, i)),
            );
            if list.len() > n * n / LISTED {
                return Self(None);
            }
        }
        Self(Some(list))
    }

    fn digraph(&self, influence: &Influence, threshold: f32) -> BitMatrix {
        let Some(list) = &self.0 else {
            return influence.digraph(threshold);
        };
        let mut graph = BitMatrix::new(influence.len(), influence.len());
        for &(v, j, i) in list.iter().filter(|e| e.0 >= threshold) {
            debug_assert!(v > 0.0);
            graph.set(j as usize, i as usize, true);
        }
        graph
    }
}
