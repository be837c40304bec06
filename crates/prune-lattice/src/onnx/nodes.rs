//! The recurrent nodes of a graph and of the graphs inside it, as networks read them.

use super::{
    RecurrentNode, Unsupported,
    fold::{Budget, Element, Found, Scopes, Value},
    proto::{Graph, Node},
};
use crate::cell::{Cell, GateLayout};
use prost::bytes::Bytes;
use std::collections::HashSet;

/// Graphs inside graphs.
const MAX_DEPTH: usize = 16;

/// The recurrent nodes of a file that were found so far.
pub(super) struct Nodes<'a> {
    file: &'a [u8],
    budget: Budget,
    /// Names that the file gives to recurrent nodes.
    given: HashSet<String>,
    pub(super) nodes: Vec<RecurrentNode>,
    pub(super) unsupported: Vec<Unsupported>,
}

impl<'a> Nodes<'a> {
    /// Those of a file, which has this graph.
    pub(super) fn of(graph: &Graph, file: &'a [u8]) -> Found<Self> {
        let mut found = Self {
            file,
            budget: Budget::of(file),
            given: HashSet::new(),
            nodes: Vec::new(),
            unsupported: Vec::new(),
        };
        given_names(graph, &mut found.given);
        found.collect(&mut vec![graph], &mut Vec::new())?;
        Ok(found)
    }

    /// Adds those of the innermost graph, which lies at `path`, and of the graphs inside it.
    fn collect(&mut self, graphs: &mut Vec<&Graph>, path: &mut Vec<(usize, usize)>) -> Found<()> {
        if graphs.len() > MAX_DEPTH {
            return Err(format!("more than {MAX_DEPTH} graphs inside each other"));
        }
        let graph = *graphs.last().expect("called with a graph");
        for (k, node) in graph.node.iter().enumerate() {
            let operator = node.op_type.as_str();
            if let Some(cell) = cell_of(operator) {
                let name = match node.name.is_empty() {
                    true => self.default_name(graphs, path, k),
                    false => node.name.clone(),
                };
                let scopes = Scopes::new(graphs.clone(), self.file, &self.budget);
                match recurrent(node, cell, &scopes, &name) {
                    Ok(node) => self.nodes.push(RecurrentNode {
                        graph: path.clone(),
                        at: k,
                        ..node
                    }),
                    Err(reason) => self.unsupported.push(Unsupported {
                        name,
                        operator: operator.into(),
                        reason,
                    }),
                }
            }
            for (a, attribute) in node.attribute.iter().enumerate() {
                if let Some(inner) = &attribute.g {
                    graphs.push(inner);
                    path.push((k, a));
                    self.collect(graphs, path)?;
                    path.pop();
                    graphs.pop();
                }
            }
        }
        Ok(())
    }

    /// A name for node `k`, which has none, of the innermost graph: no other node of the file has it.
    fn default_name(&self, graphs: &[&Graph], path: &[(usize, usize)], k: usize) -> String {
        let outer = graphs.iter().zip(path);
        let way: String = outer
            .map(|(graph, &(node, a))| format!("{node}.{}.", graph.node[node].attribute[a].name))
            .collect();
        let operator = &graphs[path.len()].node[k].op_type;
        let mut name = format!("{operator} {way}{k}");
        while self.given.contains(&name) {
            name.push('_');
        }
        name
    }
}

fn cell_of(operator: &str) -> Option<Cell> {
    match operator {
        "LSTM" => Some(Cell::Lstm),
        "GRU" => Some(Cell::Gru),
        "RNN" => Some(Cell::Tanh),
        _ => None,
    }
}

/// Adds the names that recurrent nodes have in a graph and in those inside it.
fn given_names(graph: &Graph, names: &mut HashSet<String>) {
    for node in &graph.node {
        if cell_of(&node.op_type).is_some() && !node.name.is_empty() {
            names.insert(node.name.clone());
        }
        for inner in node.attribute.iter().filter_map(|a| a.g.as_ref()) {
            given_names(inner, names);
        }
    }
}

/// Reads a node, after refusing by name what the crate's cells do not compute.
fn recurrent(node: &Node, cell: Cell, scopes: &Scopes<'_>, name: &str) -> Found<RecurrentNode> {
    let text = |b: &Bytes| String::from_utf8_lossy(b).into_owned();
    let direction = node.attribute("direction").map(|a| text(&a.s));
    if direction.as_deref().is_some_and(|d| d != "forward") {
        return Err(format!(
            "direction `{}` is not supported",
            direction.unwrap_or_default()
        ));
    }
    if node.attribute("clip").is_some() {
        return Err("clip is not supported".into());
    }
    if node.attribute("input_forget").is_some_and(|a| a.i != 0) {
        return Err("input_forget = 1 is not supported".into());
    }
    if cell == Cell::Lstm && node.input(7).is_some() {
        return Err("peepholes (P) are not supported".into());
    }
    if cell == Cell::Gru
        && node
            .attribute("linear_before_reset")
            .is_none_or(|a| a.i == 0)
    {
        return Err("linear_before_reset = 0 is another cell; only 1 is supported".into());
    }
    let activations: Vec<String> = node
        .attribute("activations")
        .map(|a| a.strings.iter().map(|s| text(s).to_lowercase()).collect())
        .unwrap_or_default();
    let (cell, usual): (Cell, &[&str]) = match cell {
        Cell::Lstm => (cell, &["sigmoid", "tanh", "tanh"]),
        Cell::Gru => (cell, &["sigmoid", "tanh"]),
        _ if activations == ["relu"] => (Cell::Relu, &["relu"]),
        _ => (cell, &["tanh"]),
    };
    if !activations.is_empty() && activations != usual {
        return Err(format!("activations {activations:?} are not supported"));
    }
    let gates = cell.gates();
    // Without the axis of directions.
    let matrix = |at: usize, role: &str| -> Found<(Vec<usize>, Vec<Element>)> {
        let input = node.input(at).ok_or_else(|| format!("it has no {role}"))?;
        match scopes.value(input).map_err(|e| format!("{role}: {e}"))? {
            Value::Floats(dims, values) if dims.first() == Some(&1) => {
                Ok((dims[1..].to_vec(), values))
            }
            Value::Floats(dims, _) | Value::Ints(dims, _) => Err(format!(
                "{role} has the shape {dims:?}; a first axis of 1 is expected"
            )),
        }
    };
    let (w_shape, w) = matrix(1, "W")?;
    let (r_shape, r) = matrix(2, "R")?;
    let (&[rows, width], &[r_rows, hidden]) = (w_shape.as_slice(), r_shape.as_slice()) else {
        return Err(format!("W {w_shape:?} and R {r_shape:?} are no matrices"));
    };
    if hidden == 0 || width == 0 || rows != gates * hidden || r_rows != rows {
        return Err(format!(
            "W {w_shape:?} and R {r_shape:?} do not fit {gates} gates"
        ));
    }
    let stated = node.attribute("hidden_size").map(|a| a.i);
    if stated.is_some_and(|s| s != hidden as i64) {
        return Err(format!("hidden_size is {stated:?}, R has {hidden} columns"));
    }
    let reordered = |values: &[Element], cols: usize| -> Vec<Element> {
        let block = hidden * cols;
        let positions = GateLayout::Onnx.positions(cell).iter();
        positions
            .flat_map(|&p| values[p * block..(p + 1) * block].iter().copied())
            .collect()
    };
    let (bias_ih, bias_hh) = match node.input(3) {
        None => (Vec::new(), Vec::new()),
        Some(_) => {
            let (shape, b) = matrix(3, "B")?;
            if shape != [2 * rows] {
                return Err(format!(
                    "B has {shape:?} entries, {} are expected",
                    2 * rows
                ));
            }
            (reordered(&b[..rows], 1), reordered(&b[rows..], 1))
        }
    };
    Ok(RecurrentNode {
        name: name.to_owned(),
        cell,
        hidden,
        width,
        graph: Vec::new(),
        at: 0,
        weight_ih: reordered(&w, width),
        weight_hh: reordered(&r, hidden),
        bias_ih,
        bias_hh,
    })
}
