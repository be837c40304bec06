//! Who else reads the places of a file that new weights are written to.

use super::{
    OnnxFile, RecurrentNode,
    fold::{Budget, FOLDED, Scopes, Value, place},
    proto::{Graph, Model, Node, TensorData},
};
use prost::Message;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Operators that read nothing but a tensor's shape.
const OF_SHAPE: [&str; 2] = ["Shape", "Size"];

/// A tensor that changes, and who else reads it.
pub(super) struct Shared {
    pub(super) tensor: String,
    pub(super) reader: String,
}

impl OnnxFile {
    /// A part of the file that reads some of the places which change for a node, if there is one. The same layer in another
    /// branch does not count: it should change as well.
    pub(super) fn other_reader(
        &self,
        node: &RecurrentNode,
        changed: &BTreeSet<usize>,
    ) -> Option<Shared> {
        if changed.is_empty() {
            return None;
        }
        // It was decoded before, when the file was read.
        let graph = Model::decode(self.bytes.clone()).ok()?.graph?;
        let same =
            |n: &&RecurrentNode| (n.at, &n.graph) == (node.at, &node.graph) || same_layer(n, node);
        let mut search = Search {
            file: &self.bytes,
            changed,
            layers: self.nodes.iter().filter(same).collect(),
            budget: Budget::of(&self.bytes),
            graphs: Vec::new(),
            path: Vec::new(),
            values: Vec::new(),
            tensors: BTreeMap::new(),
        };
        search.visit(&graph)
    }
}

/// Whether two nodes are one layer in two branches of an `If`: they have the same weights at the same places, and only one of
/// them runs.
fn same_layer(a: &RecurrentNode, b: &RecurrentNode) -> bool {
    let places = |n: &RecurrentNode| -> Vec<Option<usize>> {
        let parts = [&n.weight_ih, &n.weight_hh, &n.bias_ih, &n.bias_hh];
        parts.into_iter().flatten().map(|e| e.1).collect()
    };
    let mut ways = a.graph.iter().zip(&b.graph);
    // Where the ways to their graphs part, it is at one node.
    let branches = ways.find(|(x, y)| x != y).is_some_and(|(x, y)| x.0 == y.0);
    branches && (a.cell, a.hidden, a.width) == (b.cell, b.hidden, b.width) && places(a) == places(b)
}

/// A walk over the nodes of a file, each after those that it reads, as the format asks for.
struct Search<'a> {
    file: &'a [u8],
    changed: &'a BTreeSet<usize>,
    /// The nodes that should change.
    layers: Vec<&'a RecurrentNode>,
    budget: Budget,
    /// The graphs that the walk is in, outermost first, and the way to the last of them.
    graphs: Vec<&'a Graph>,
    path: Vec<(usize, usize)>,
    /// Of each of these graphs: which values may hold elements of tensors that change.
    values: Vec<HashMap<&'a str, bool>>,
    /// The tensors that change, by where they begin.
    tensors: BTreeMap<usize, &'a str>,
}

impl<'a> Search<'a> {
    fn visit(&mut self, graph: &'a Graph) -> Option<Shared> {
        self.graphs.push(graph);
        self.values.push(HashMap::new());
        for tensor in &graph.initializer {
            self.define_tensor(&tensor.name, tensor);
        }
        for (k, node) in graph.node.iter().enumerate() {
            let op = node.op_type.as_str();
            let moves = FOLDED.contains(&op);
            let touched = node.input.iter().any(|name| self.touched(name));
            if touched && !moves && !OF_SHAPE.contains(&op) {
                let here = |n: &&RecurrentNode| n.at == k && n.graph == self.path;
                let own = self.layers.iter().any(here);
                for (at, input) in node.input.iter().enumerate() {
                    // W, R and B are what is written.
                    let written = own && (1..=3).contains(&at);
                    let held = (!written).then(|| self.held(input)).flatten();
                    if let Some(tensor) = held {
                        let reader = label(node);
                        return Some(Shared { tensor, reader });
                    }
                }
            }
            let constant = node.attribute("value").and_then(|a| a.t.as_ref());
            for output in &node.output {
                match constant.filter(|_| op == "Constant") {
                    Some(tensor) => self.define_tensor(output, tensor),
                    None => self.define(output, touched && moves),
                }
            }
            for (a, attribute) in node.attribute.iter().enumerate() {
                if let Some(inner) = &attribute.g {
                    self.path.push((k, a));
                    let found = self.visit(inner);
                    if found.is_some() {
                        return found;
                    }
                    self.path.pop();
                }
            }
        }
        for output in &graph.output {
            if let Some(tensor) = self.held(&output.name) {
                let reader = format!("the output `{}` of its graph", output.name);
                return Some(Shared { tensor, reader });
            }
        }
        self.graphs.pop();
        self.values.pop();
        None
    }

    fn define(&mut self, name: &'a str, touched: bool) {
        if let Some(values) = self.values.last_mut() {
            values.insert(name, touched);
        }
    }

    fn define_tensor(&mut self, name: &'a str, tensor: &TensorData) {
        let file = (self.file.as_ptr() as usize, self.file.len());
        let changes = |start: &usize| {
            let end = start + tensor.raw_data.len();
            self.changed.range(*start..end).next().is_some()
        };
        let start = place(&tensor.raw_data, file).filter(changes);
        self.tensors.extend(start.map(|start| (start, name)));
        self.define(name, start.is_some());
    }

    fn touched(&self, name: &str) -> bool {
        let mut scopes = self.values.iter().rev();
        scopes.find_map(|values| values.get(name)) == Some(&true)
    }

    /// The tensor whose changed elements the value of that name holds.
    fn held(&self, name: &str) -> Option<String> {
        if !self.touched(name) {
            return None;
        }
        let scopes = Scopes::new(self.graphs.clone(), self.file, &self.budget);
        match scopes.value(name) {
            Ok(Value::Ints(..)) => None,
            Ok(Value::Floats(_, elements)) => {
                let mut places = elements.iter().filter_map(|e| e.1);
                let changed = places.find(|at| self.changed.contains(at))?;
                let tensor = self.tensors.range(..=changed).next_back();
                Some(tensor.map_or(name, |(_, tensor)| *tensor).to_owned())
            }
            // Something is made of the tensor that cannot be followed element by element.
            Err(_) => Some(name.to_owned()),
        }
    }
}

fn label(node: &Node) -> String {
    let op = &node.op_type;
    match (node.name.as_str(), node.output.first()) {
        ("", Some(output)) => format!("{op} node of output `{output}`"),
        (name, _) => format!("{op} node `{name}`"),
    }
}
