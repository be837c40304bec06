//! Constant parts of a graph: initializers, and what nine operators that only move elements make of them.
//!
//! Every float element remembers the byte of the file that it was read from, so that a weight can be written back to where
//! it came from whatever slices and concatenations lie between.

use super::proto::{Graph, Node, TensorData};
use std::{cell::Cell, collections::HashMap};

/// Largest number of axes of a tensor.
const MAX_RANK: usize = 32;
/// Elements that may be computed for each byte of a file: a weight of four bytes passes through a few operators, and a file that
/// asks for more only repeats what it has.
const ELEMENTS_A_BYTE: usize = 8;
/// Operators between an initializer and a weight.
const MAX_CHAIN: usize = 64;
const FLOAT: i32 = 1;
const INT32: i32 = 6;
const INT64: i32 = 7;
/// Operators beside `Constant` that are folded: they move elements and change none.
pub(super) const FOLDED: [&str; 8] = [
    "Identity",
    "Cast",
    "Unsqueeze",
    "Squeeze",
    "Reshape",
    "Transpose",
    "Slice",
    "Concat",
];

/// One element: its value and where in the file it stands (`None`: not in place, such as `float_data`).
pub(super) type Element = (f32, Option<usize>);

/// A constant.
#[derive(Debug, Clone)]
pub(super) enum Value {
    Floats(Vec<usize>, Vec<Element>),
    Ints(Vec<usize>, Vec<i64>),
}

pub(super) type Found<T> = Result<T, String>;

impl Value {
    fn dims(&self) -> &[usize] {
        match self {
            Value::Floats(d, _) | Value::Ints(d, _) => d,
        }
    }

    /// The elements at some positions, as a tensor of another shape.
    fn gather(&self, dims: Vec<usize>, at: &[usize]) -> Value {
        match self {
            Value::Floats(_, v) => Value::Floats(dims, at.iter().map(|&k| v[k]).collect()),
            Value::Ints(_, v) => Value::Ints(dims, at.iter().map(|&k| v[k]).collect()),
        }
    }

    fn len(&self) -> usize {
        match self {
            Value::Floats(_, v) => v.len(),
            Value::Ints(_, v) => v.len(),
        }
    }

    fn reshaped(mut self, to: Vec<usize>) -> Found<Value> {
        check_rank(to.len())?;
        if elements(&to)? != self.len() {
            return Err(format!("shape {:?} cannot become {to:?}", self.dims()));
        }
        match &mut self {
            Value::Floats(d, _) | Value::Ints(d, _) => *d = to,
        }
        Ok(self)
    }

    fn ints(&self) -> Found<Vec<i64>> {
        match self {
            Value::Ints(_, v) => Ok(v.clone()),
            Value::Floats(..) => Err("floats where integers are needed".into()),
        }
    }
}

/// The elements that may still be computed for a file.
pub(super) struct Budget(Cell<usize>);

impl Budget {
    pub(super) fn of(file: &[u8]) -> Self {
        Self(Cell::new(file.len().saturating_mul(ELEMENTS_A_BYTE)))
    }

    fn spend(&self, elements: usize) -> Found<()> {
        let left = self.0.get().checked_sub(elements);
        self.0.set(left.unwrap_or(0));
        left.map(|_| ()).ok_or_else(|| {
            format!(
                "its constants have more than {ELEMENTS_A_BYTE} elements for each byte of the file"
            )
        })
    }
}

/// A graph and those around it; names of outer graphs are visible.
pub(super) struct Scopes<'a> {
    graphs: Vec<&'a Graph>,
    /// Start of the file in memory and its length, to find the place of a slice.
    file: (usize, usize),
    budget: &'a Budget,
}

impl<'a> Scopes<'a> {
    pub(super) fn new(graphs: Vec<&'a Graph>, file: &[u8], budget: &'a Budget) -> Self {
        Self {
            graphs,
            file: (file.as_ptr() as usize, file.len()),
            budget,
        }
    }

    /// The constant of that name.
    pub(super) fn value(&self, name: &str) -> Found<Value> {
        self.evaluate(name, self.graphs.len(), 0, &mut HashMap::new())
    }

    fn evaluate(
        &self,
        name: &str,
        depth: usize,
        chain: usize,
        known: &mut HashMap<String, Value>,
    ) -> Found<Value> {
        if chain > MAX_CHAIN {
            return Err(format!(
                "`{name}` lies behind more than {MAX_CHAIN} operators"
            ));
        }
        if let Some(value) = known.get(name) {
            return Ok(value.clone());
        }
        for level in (0..depth).rev() {
            let graph = self.graphs[level];
            if let Some(tensor) = graph.initializer.iter().find(|t| t.name == name) {
                return self.tensor(tensor);
            }
            if let Some(node) = graph
                .node
                .iter()
                .find(|n| n.output.iter().any(|o| o == name))
            {
                let mut input = |at: usize| match node.input(at) {
                    Some(input) => self.evaluate(input, level + 1, chain + 1, known).map(Some),
                    None => Ok(None),
                };
                let value = self.apply(node, &mut input)?;
                known.insert(name.to_owned(), value.clone());
                return Ok(value);
            }
        }
        Err(format!("`{name}` is no constant of the graph"))
    }

    fn tensor(&self, t: &TensorData) -> Found<Value> {
        let name = &t.name;
        if t.data_location != 0 || !t.external_data.is_empty() {
            return Err(format!("`{name}` has external data, which is not read"));
        }
        check_rank(t.dims.len()).map_err(|e| format!("`{name}`: {e}"))?;
        let dims: Vec<usize> = t
            .dims
            .iter()
            .map(|&d| {
                usize::try_from(d).map_err(|_| format!("`{name}` has the shape {:?}", t.dims))
            })
            .collect::<Found<_>>()?;
        // Elements take a byte of the file at least.
        let size = elements(&dims).map_err(|e| format!("`{name}`: {e}"))?;
        if size > self.file.1 {
            return Err(format!(
                "`{name}` has the shape {dims:?}, which is too large"
            ));
        }
        self.budget.spend(size)?;
        let wrong = |found: usize| format!("`{name}` of shape {dims:?} has {found} elements");
        let raw = &t.raw_data;
        let start = place(raw, self.file);
        match t.data_type {
            FLOAT if !raw.is_empty() => {
                let words = raw.chunks_exact(4).enumerate();
                let read = |(k, w): (usize, &[u8])| {
                    let value = f32::from_le_bytes([w[0], w[1], w[2], w[3]]);
                    (value, start.map(|start| start + 4 * k))
                };
                let values: Vec<Element> = words.map(read).collect();
                match values.len() == size && raw.len() == 4 * size {
                    true => Ok(Value::Floats(dims, values)),
                    false => Err(wrong(values.len())),
                }
            }
            FLOAT => match t.float_data.len() == size {
                true => {
                    let values = t.float_data.iter().map(|&v| (v, None)).collect();
                    Ok(Value::Floats(dims, values))
                }
                false => Err(wrong(t.float_data.len())),
            },
            INT64 | INT32 => {
                let values: Vec<i64> = match (t.data_type, raw.is_empty()) {
                    (INT64, false) => raw
                        .chunks_exact(8)
                        .map(|w| i64::from_le_bytes(w.try_into().expect("chunks of 8")))
                        .collect(),
                    (INT64, true) => t.int64_data.clone(),
                    (_, false) => raw
                        .chunks_exact(4)
                        .map(|w| i64::from(i32::from_le_bytes(w.try_into().expect("chunks of 4"))))
                        .collect(),
                    (_, true) => t.int32_data.iter().map(|&v| i64::from(v)).collect(),
                };
                match values.len() == size {
                    true => Ok(Value::Ints(dims, values)),
                    false => Err(wrong(values.len())),
                }
            }
            other => Err(format!("`{name}` has the data type {other}; f32 is read")),
        }
    }

    fn apply(
        &self,
        node: &Node,
        input: &mut dyn FnMut(usize) -> Found<Option<Value>>,
    ) -> Found<Value> {
        let op = node.op_type.as_str();
        let label = |reason: String| format!("{op} `{}`: {reason}", node.name);
        if op == "Constant" {
            let attribute = |name: &str| node.attribute(name);
            return match (
                attribute("value"),
                attribute("value_ints"),
                attribute("value_int"),
            ) {
                (Some(a), ..) => match &a.t {
                    Some(t) => self.tensor(t),
                    None => Err(label("it has no value".into())),
                },
                (_, Some(a), _) => Ok(Value::Ints(vec![a.ints.len()], a.ints.clone())),
                (_, _, Some(a)) => Ok(Value::Ints(vec![], vec![a.i])),
                _ => Err(label("its value is no tensor".into())),
            };
        }
        if !FOLDED.contains(&op) {
            return Err(label(
                "it is not among the operators that are folded".into(),
            ));
        }
        let x = input(0)?.ok_or_else(|| label("it has no input".into()))?;
        // What is made has as many elements as what is read, or fewer; concatenations check their own.
        self.budget.spend(x.len()).map_err(label)?;
        // Since opset 13 (10 for Slice) lists are inputs, before that attributes.
        let mut list = |name: &str, at: usize| -> Found<Option<Vec<i64>>> {
            match node.attribute(name) {
                Some(a) => Ok(Some(a.ints.clone())),
                None => input(at)?.map(|v| v.ints()).transpose(),
            }
        };
        match op {
            "Identity" => Ok(x),
            "Cast" => {
                let to = node.attribute("to").map_or(0, |a| a.i);
                match (&x, i32::try_from(to)) {
                    (Value::Floats(..), Ok(FLOAT)) | (Value::Ints(..), Ok(INT32 | INT64)) => Ok(x),
                    _ => Err(label(format!("to the data type {to}"))),
                }
            }
            "Unsqueeze" => {
                let axes = list("axes", 1)?.ok_or_else(|| label("no axes".into()))?;
                let rank = x.dims().len() + axes.len();
                check_rank(rank).map_err(label)?;
                let new: Vec<usize> = axes
                    .iter()
                    .map(|&a| axis(a, rank))
                    .collect::<Found<_>>()
                    .map_err(label)?;
                let mut old = x.dims().iter();
                let dims: Vec<usize> = (0..rank)
                    .map(|k| match new.contains(&k) {
                        true => 1,
                        false => old.next().copied().unwrap_or(1),
                    })
                    .collect();
                x.reshaped(dims).map_err(label)
            }
            "Squeeze" => {
                let rank = x.dims().len();
                let drop: Vec<usize> = match list("axes", 1)? {
                    Some(axes) => axes
                        .iter()
                        .map(|&a| axis(a, rank))
                        .collect::<Found<_>>()
                        .map_err(label)?,
                    None => (0..rank).filter(|&k| x.dims()[k] == 1).collect(),
                };
                let keep = (0..rank).filter(|k| !drop.contains(k));
                let dims = keep.map(|k| x.dims()[k]).collect();
                x.reshaped(dims).map_err(label)
            }
            "Reshape" => {
                let shape = list("shape", 1)?.ok_or_else(|| label("no shape".into()))?;
                let dims = reshape(&x, &shape).map_err(label)?;
                x.reshaped(dims).map_err(label)
            }
            "Transpose" => {
                let rank = x.dims().len();
                let perm: Vec<usize> = match node.attribute("perm") {
                    Some(a) => a
                        .ints
                        .iter()
                        .map(|&p| axis(p, rank))
                        .collect::<Found<_>>()
                        .map_err(label)?,
                    None => (0..rank).rev().collect(),
                };
                let mut seen = perm.clone();
                seen.sort_unstable();
                if seen != (0..rank).collect::<Vec<_>>() {
                    return Err(label(format!("permutation {perm:?} of {rank} axes")));
                }
                let from = strides(x.dims());
                let dims: Vec<usize> = perm.iter().map(|&p| x.dims()[p]).collect();
                let steps: Vec<usize> = perm.iter().map(|&p| from[p]).collect();
                let at = positions(&dims, |k, i| steps[k] * i);
                Ok(x.gather(dims, &at))
            }
            "Slice" => slice(&x, &mut list).map_err(label),
            _ => {
                let at = node.attribute("axis").map_or(0, |a| a.i);
                let mut parts = vec![x];
                for k in 1..node.input.len() {
                    let part = input(k)?;
                    self.budget.spend(part.as_ref().map_or(0, Value::len))?;
                    parts.extend(part);
                }
                concat(&parts, at).map_err(label)
            }
        }
    }
}

fn check_rank(rank: usize) -> Found<()> {
    match rank <= MAX_RANK {
        true => Ok(()),
        false => Err(format!("{rank} axes are more than {MAX_RANK}")),
    }
}

/// Where a piece of the file, which begins at an address and has a length, stands in it. Fields of messages are slices of the
/// file; one that was copied has no place.
pub(super) fn place(piece: &[u8], (file, len): (usize, usize)) -> Option<usize> {
    let start = (piece.as_ptr() as usize).wrapping_sub(file);
    let end = start.checked_add(piece.len())?;
    (end <= len).then_some(start)
}

/// Elements of a constant of a shape. The one empty constant that graphs have a use for here is the list without entries (the
/// shape of a scalar). Other shapes with an axis of 0 are refused: so no axis, and no product of some of the axes, is larger than
/// the number of elements.
fn elements(dims: &[usize]) -> Found<usize> {
    match dims {
        [0] => Ok(0),
        _ if dims.contains(&0) => Err(format!("shape {dims:?} has an empty axis")),
        _ => size_of(dims).ok_or_else(|| format!("shape {dims:?} is too large")),
    }
}

/// Product of sizes.
fn size_of(dims: &[usize]) -> Option<usize> {
    dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d))
}

/// The shape that a list of sizes asks for: 0 copies an axis, one -1 takes what is left.
fn reshape(x: &Value, shape: &[i64]) -> Found<Vec<usize>> {
    check_rank(shape.len())?;
    let wrong = || format!("shape {shape:?} of {} elements", x.len());
    let size = |(k, &d): (usize, &i64)| match d {
        0 => Ok(Some(x.dims().get(k).copied().unwrap_or(0))),
        -1 => Ok(None),
        d => usize::try_from(d).map(Some).map_err(|_| wrong()),
    };
    let sizes: Vec<Option<usize>> = shape.iter().enumerate().map(size).collect::<Found<_>>()?;
    let known: Vec<usize> = sizes.iter().copied().flatten().collect();
    if known.len() + 1 < sizes.len() {
        return Err(wrong());
    }
    let known = size_of(&known).ok_or_else(wrong)?;
    let left = x.len().checked_div(known).unwrap_or(0);
    Ok(sizes.into_iter().map(|d| d.unwrap_or(left)).collect())
}

fn axis(a: i64, rank: usize) -> Found<usize> {
    let k = if a < 0 { a + rank as i64 } else { a };
    match usize::try_from(k) {
        Ok(k) if k < rank => Ok(k),
        _ => Err(format!("axis {a} of {rank}")),
    }
}

fn strides(dims: &[usize]) -> Vec<usize> {
    let mut out = vec![1; dims.len()];
    for k in (1..dims.len()).rev() {
        out[k - 1] = out[k] * dims[k];
    }
    out
}

/// For every element of a tensor of shape `dims`, row-major, the sum over the axes of `offset(axis, index)`.
fn positions(dims: &[usize], offset: impl Fn(usize, usize) -> usize) -> Vec<usize> {
    let mut at = vec![0usize];
    for (k, &d) in dims.iter().enumerate() {
        at = at
            .iter()
            .flat_map(|&p| (0..d).map(move |i| (p, i)))
            .map(|(p, i)| p + offset(k, i))
            .collect();
    }
    at
}

/// Reads a list of integers: an attribute by name, or an input by number.
type Lists<'a> = dyn FnMut(&str, usize) -> Found<Option<Vec<i64>>> + 'a;

fn slice(x: &Value, list: &mut Lists<'_>) -> Found<Value> {
    let dims = x.dims().to_vec();
    let starts = list("starts", 1)?.ok_or("no starts")?;
    let ends = list("ends", 2)?.ok_or("no ends")?;
    let axes = list("axes", 3)?.unwrap_or_else(|| (0..starts.len() as i64).collect());
    let steps = list("steps", 4)?.unwrap_or_else(|| vec![1; starts.len()]);
    if starts.len() != ends.len() || starts.len() != axes.len() || steps.iter().any(|&s| s != 1) {
        return Err(format!(
            "starts {starts:?}, ends {ends:?}, axes {axes:?}, steps {steps:?}"
        ));
    }
    let mut ranges: Vec<(usize, usize)> = dims.iter().map(|&d| (0, d)).collect();
    for ((&s, &e), &a) in starts.iter().zip(&ends).zip(&axes) {
        let a = axis(a, dims.len())?;
        let clamp = |v: i64| {
            let v = if v < 0 {
                v.saturating_add(dims[a] as i64)
            } else {
                v
            };
            v.clamp(0, dims[a] as i64) as usize
        };
        ranges[a] = (clamp(s), clamp(e).max(clamp(s)));
    }
    let from = strides(&dims);
    let shape: Vec<usize> = ranges.iter().map(|(s, e)| e - s).collect();
    elements(&shape)?;
    let at = positions(&shape, |k, i| from[k] * (ranges[k].0 + i));
    Ok(x.gather(shape, &at))
}

fn concat(parts: &[Value], at: i64) -> Found<Value> {
    let first = parts[0].dims();
    let a = axis(at, first.len())?;
    let fits = |v: &&Value| {
        let d = v.dims();
        d.len() == first.len() && (0..d.len()).all(|k| k == a || d[k] == first[k])
    };
    if !parts.iter().all(|v| fits(&v)) {
        let shapes: Vec<&[usize]> = parts.iter().map(Value::dims).collect();
        return Err(format!("shapes {shapes:?} on axis {at}"));
    }
    let mut dims = first.to_vec();
    dims[a] = parts.iter().map(|v| v.dims()[a]).sum();
    let outer: usize = dims[..a].iter().product();
    let (mut floats, mut ints) = (Vec::new(), Vec::new());
    for o in 0..outer {
        for part in parts {
            let len: usize = part.dims()[a..].iter().product();
            match part {
                Value::Floats(_, v) => floats.extend_from_slice(&v[o * len..(o + 1) * len]),
                Value::Ints(_, v) => ints.extend_from_slice(&v[o * len..(o + 1) * len]),
            }
        }
    }
    let integers = parts.iter().filter(|v| matches!(v, Value::Ints(..)));
    match integers.count() {
        0 => Ok(Value::Floats(dims, floats)),
        n if n == parts.len() => Ok(Value::Ints(dims, ints)),
        _ => Err("floats beside integers".into()),
    }
}
