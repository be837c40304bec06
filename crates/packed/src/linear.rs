//! Linear layers: y = W x + B (A x) + b.

use std::fmt;
use std::sync::Arc;

use rayon::prelude::*;

use crate::error::check_length;
use crate::input::{FloatBlock, Int8Block, blocks_of};
use crate::kernel::bf16::{PairPanels, Pairs};
use crate::kernel::dense::{Dense, lanes};
use crate::kernel::panel::{Panel, Panels, Part, Transposed, WidenDense, WidenTiles};
use crate::kernel::tail::{AddTail, Float, SideTiles, Tail};
use crate::kernel::tiles::{Arithmetic, Floats, Int8, Products, Tokens};
use crate::kernel::{Format, WithFormat, with_format};
use crate::level::Level;
use crate::matrix::Weight;
use crate::output::{Claim, Output};
use crate::team::Team;
use crate::tile::{BLOCK, TILE_ROWS, Tiles};
use crate::{Error, Matrix, Result};

/// How weights are multiplied. Dense weights and factors of low rank take floats in [`Self::F32`] and [`Self::Int8`]; in
/// [`Self::Bf16`] they and their activations are rounded to bf16 as those of quantised weights are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Activations {
    /// Activations as they are: for quality numbers, calibration and repair.
    #[default]
    F32,
    /// Activations rounded to 8 bits, one scale for 32 columns: for generation. About 0.5 % error of an output.
    Int8,
    /// From 16 tokens on, weights, factors of low rank and activations rounded to bf16 and sums in f32; fewer tokens as in
    /// [`Self::F32`]. Faster
    /// than f32 where the processor has AVX512-BF16, and slower elsewhere, with the same results.
    Bf16,
}

/// How products are computed.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct Context<'a> {
    /// The arithmetic.
    pub activations: Activations,
    /// The instructions. Results do not depend on them.
    pub level: Level,
    /// The threads. Results do not depend on them.
    pub team: &'a Team,
}

impl Context<'static> {
    /// The fastest instructions and the threads of the process.
    pub fn new(activations: Activations) -> Self {
        Self {
            activations,
            level: Level::detected(),
            team: Team::global(),
        }
    }
}

impl Default for Context<'static> {
    fn default() -> Self {
        Self::new(Activations::default())
    }
}

impl fmt::Debug for Context<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("activations", &self.activations)
            .field("level", &self.level)
            .field("threads", &self.team.threads())
            .finish()
    }
}

impl<'a> Context<'a> {
    /// With other instructions.
    pub fn with_level(self, level: Level) -> Self {
        Self { level, ..self }
    }

    /// With other threads.
    pub fn with_team<'b>(self, team: &'b Team) -> Context<'b> {
        Context {
            activations: self.activations,
            level: self.level,
            team,
        }
    }
}

/// Factors of low rank beside a weight: `scale · B A`.
#[derive(Clone, Debug)]
pub struct LowRank {
    a: Matrix,
    b: SideTiles,
    rows: usize,
    scale: f32,
}

impl LowRank {
    /// From A `[rank, cols]` and B `[rows, rank]`, both of floats.
    ///
    /// # Errors
    /// [`Error::Factors`] for quantised factors, [`Error::Length`] when the ranks differ.
    pub fn new(a: &Matrix, b: &Matrix, scale: f32) -> Result<Self> {
        check_length("columns of B", b.cols(), a.rows())?;
        let dense = |matrix: &Matrix| match &matrix.weight {
            Weight::Dense(dense) => Ok(dense.clone()),
            Weight::Tiles { .. } => Err(Error::Factors),
        };
        dense(a)?;
        let b = dense(b)?;
        Ok(Self {
            a: a.clone(),
            rows: b.rows,
            b: SideTiles::new(b.float(), b.cols, b.data()),
            scale,
        })
    }

    /// The rank.
    pub fn rank(&self) -> usize {
        self.a.rows()
    }

    /// The matrix that the factors stand for, `scale · B A`, row-major.
    pub fn product(&self) -> Vec<f32> {
        let (rank, cols) = (self.rank(), self.a.cols());
        let a = self.a.dequantise();
        let mut product = vec![0.0; self.rows * cols];
        for (row, values) in product.chunks_exact_mut(cols.max(1)).enumerate() {
            for k in 0..rank {
                let b = self.scale * self.b.value(row, k);
                let a = &a[k * cols..][..cols];
                values.iter_mut().zip(a).for_each(|(y, a)| *y += b * a);
            }
        }
        product
    }

    /// Bytes that a product reads.
    pub fn bytes(&self) -> usize {
        self.a.bytes() + self.b.bytes()
    }
}

/// A weight with an optional bias and optional factors of low rank. Cloning shares the weights.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Matrix,
    low_rank: Option<Arc<LowRank>>,
    bias: Option<Bias>,
}

/// Filled up to whole tiles.
#[derive(Clone, Debug)]
struct Bias(Arc<[f32]>);

impl From<Matrix> for Linear {
    fn from(weight: Matrix) -> Self {
        Self {
            weight,
            low_rank: None,
            bias: None,
        }
    }
}

impl Linear {
    /// With a bias, one value for each row.
    ///
    /// # Errors
    /// [`Error::Length`] for another number of values.
    pub fn with_bias(self, bias: &[f32]) -> Result<Self> {
        check_length("values of the bias", bias.len(), self.rows())?;
        let mut filled = bias.to_vec();
        filled.resize(bias.len().next_multiple_of(TILE_ROWS), 0.0);
        let bias = Some(Bias(filled.into()));
        Ok(Self { bias, ..self })
    }

    /// With factors of low rank.
    ///
    /// # Errors
    /// [`Error::Length`] when their shapes are not the weight's.
    pub fn with_low_rank(self, low_rank: LowRank) -> Result<Self> {
        check_length("columns of A", low_rank.a.cols(), self.cols())?;
        check_length("rows of B", low_rank.rows, self.rows())?;
        let low_rank = Some(Arc::new(low_rank));
        Ok(Self { low_rank, ..self })
    }

    /// The weight.
    pub fn weight(&self) -> &Matrix {
        &self.weight
    }

    /// The factors of low rank.
    pub fn low_rank(&self) -> Option<&LowRank> {
        self.low_rank.as_deref()
    }

    /// The bias.
    pub fn bias(&self) -> Option<&[f32]> {
        let rows = self.rows();
        self.bias.as_ref().map(|Bias(values)| &values[..rows])
    }

    /// Rows (outputs).
    pub fn rows(&self) -> usize {
        self.weight.rows()
    }

    /// Columns (inputs).
    pub fn cols(&self) -> usize {
        self.weight.cols()
    }

    /// Bytes that a product reads.
    pub fn bytes(&self) -> usize {
        let low_rank = self.low_rank().map_or(0, LowRank::bytes);
        let bias = self.bias().map_or(0, size_of_val);
        self.weight.bytes() + low_rank + bias
    }

    /// Multiplies tokens `x` `[tokens, cols]` to `y` `[tokens, rows]`, both row-major.
    ///
    /// # Errors
    /// [`Error::Length`] when `x` is not whole tokens or `y` has not as many.
    pub fn forward(&self, x: &[f32], y: &mut [f32], context: &Context<'_>) -> Result<()> {
        forward(&[self], x, &mut [y], context)
    }
}

/// Multiplies the same tokens with several layers, such as those of queries, keys and values: activations are rounded
/// once, and the threads meet once.
///
/// # Errors
/// [`Error::Length`] as for [`Linear::forward`], and for layers of other widths than the first.
pub fn forward(
    layers: &[&Linear],
    x: &[f32],
    y: &mut [&mut [f32]],
    context: &Context<'_>,
) -> Result<()> {
    check_length("outputs", y.len(), layers.len())?;
    let Some(first) = layers.first() else {
        return Ok(());
    };
    let cols = first.cols();
    let tokens = x.len().checked_div(cols).unwrap_or(0);
    check_length("values of the input", x.len(), tokens * cols)?;
    for (layer, y) in layers.iter().zip(y.iter()) {
        check_length("columns of a layer", layer.cols(), cols)?;
        check_length("values of the output", y.len(), tokens * layer.rows())?;
    }
    if tokens == 0 {
        return Ok(());
    }
    let mut inputs = Inputs::new(x, cols, tokens);

    // A x of all layers with factors of low rank.
    let factors: Vec<&LowRank> = layers.iter().filter_map(|layer| layer.low_rank()).collect();
    let mut projected: Vec<Vec<f32>> = factors
        .iter()
        .map(|factor| vec![0.0; tokens * factor.rank()])
        .collect();
    if !factors.is_empty() {
        let products = factors
            .iter()
            .zip(&mut projected)
            .map(|(factor, out)| Product {
                weight: &factor.a.weight,
                tail: Tail::default(),
                out,
            });
        run(products.collect(), &mut inputs, context);
        for (factor, out) in factors.iter().zip(&mut projected) {
            out.iter_mut().for_each(|value| *value *= factor.scale);
        }
    }

    let mut projected = projected.iter();
    let products = layers.iter().zip(y.iter_mut()).map(|(layer, y)| Product {
        weight: &layer.weight.weight,
        tail: Tail {
            side: layer
                .low_rank()
                .map(|factor| (&factor.b, projected.next().expect("one each").as_slice())),
            bias: layer.bias.as_ref().map(|Bias(values)| &**values),
        },
        out: y,
    });
    run(products.collect(), &mut inputs, context);
    Ok(())
}

/// One product of a region.
struct Product<'a, 'o> {
    weight: &'a Weight,
    tail: Tail<'o>,
    out: &'o mut [f32],
}

/// From this many tokens on, weights are widened to floats once for all of them (except in int8 arithmetic).
const MANY: usize = 16;
/// Bytes of weights that a thread claims at once: some microseconds of reading.
const CLAIM_BYTES: usize = 32 * 1024;
/// Values from which on the input is prepared by several threads.
const LARGE_INPUT: usize = 64 * 1024;

/// Which form of the input a product reads.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    Int8,
    Floats,
    Lanes(Float),
    Transposed,
    Pairs,
}

fn form_of(weight: &Weight, tokens: usize, activations: Activations) -> Form {
    match (weight, activations) {
        (Weight::Tiles { .. }, Activations::Int8) => Form::Int8,
        (_, Activations::Bf16) if tokens >= MANY => Form::Pairs,
        _ if tokens >= MANY => Form::Transposed,
        (Weight::Tiles { .. }, Activations::F32 | Activations::Bf16) => Form::Floats,
        (Weight::Dense(dense), _) => Form::Lanes(dense.float()),
    }
}

/// The input in the forms that products read.
enum Prepared {
    Int8(Vec<Int8Block>),
    Floats(Vec<FloatBlock>),
    Transposed(Transposed),
    Pairs(Pairs),
}

/// The input, prepared once for each form.
struct Inputs<'a> {
    x: &'a [f32],
    cols: usize,
    tokens: usize,
    forms: Vec<(Form, Option<&'a [u32]>, Prepared)>,
}

impl<'a> Inputs<'a> {
    fn new(x: &'a [f32], cols: usize, tokens: usize) -> Self {
        Self {
            x,
            cols,
            tokens,
            forms: Vec::new(),
        }
    }

    /// Index of the prepared form.
    fn prepare(&mut self, form: Form, order: Option<&'a [u32]>) -> usize {
        let known = |(f, o, _): &(Form, Option<&[u32]>, _)| {
            *f == form && o.map(<[u32]>::as_ptr) == order.map(<[u32]>::as_ptr)
        };
        if let Some(at) = self.forms.iter().position(known) {
            return at;
        }
        let prepared = match form {
            Form::Int8 => Prepared::Int8(self.blocks(order, Int8Block::round)),
            Form::Floats => Prepared::Floats(self.blocks(order, FloatBlock::new)),
            Form::Lanes(float) => {
                let block = |x: &[f32; BLOCK]| FloatBlock::new(&lanes(float, x));
                Prepared::Floats(self.blocks(order, block))
            }
            Form::Pairs => Prepared::Pairs(Pairs::new(self.x, self.cols, order)),
            Form::Transposed => Prepared::Transposed(Transposed::new(self.x, self.cols, order)),
        };
        self.forms.push((form, order, prepared));
        self.forms.len() - 1
    }

    fn blocks<B: Send>(
        &self,
        order: Option<&[u32]>,
        block: impl Fn(&[f32; BLOCK]) -> B + Sync,
    ) -> Vec<B> {
        let blocks = self.cols.div_ceil(BLOCK);
        let token = |x: &[f32], to: &mut Vec<B>| blocks_of(x, order, |x| to.push(block(x)));
        if self.x.len() < LARGE_INPUT {
            let mut all = Vec::with_capacity(self.tokens * blocks);
            for x in self.x.chunks_exact(self.cols) {
                token(x, &mut all);
            }
            return all;
        }
        let parts = self.x.par_chunks_exact(self.cols).map(|x| {
            let mut part = Vec::with_capacity(blocks);
            token(x, &mut part);
            part
        });
        parts.collect::<Vec<_>>().into_iter().flatten().collect()
    }
}

/// Runs products of the same input in one region.
fn run<'a>(products: Vec<Product<'a, '_>>, inputs: &mut Inputs<'a>, context: &Context<'_>) {
    let tokens = inputs.tokens;
    let threads = context.team.threads();
    let forms: Vec<usize> = products
        .iter()
        .map(|product| {
            let form = form_of(product.weight, tokens, context.activations);
            let order = match product.weight {
                Weight::Tiles { order, .. } => order.as_deref(),
                Weight::Dense(_) => None,
            };
            inputs.prepare(form, order)
        })
        .collect();
    let jobs: Vec<Job<'_>> = products
        .into_iter()
        .zip(forms)
        .map(|(product, form)| {
            let (rows, tile_bytes) = match product.weight {
                Weight::Dense(dense) => {
                    let row_bytes = dense.cols * dense.ty.block_bytes();
                    (dense.rows, TILE_ROWS * row_bytes)
                }
                Weight::Tiles { tiles, .. } => (tiles.rows(), tiles.tile_bytes()),
            };
            let tiles = rows.div_ceil(TILE_ROWS);
            let by_bytes = CLAIM_BYTES.div_ceil(tile_bytes.max(1));
            // Pairs of tiles for panels; several claims for each thread.
            let grain = by_bytes
                .min(tiles.div_ceil(4 * threads))
                .next_multiple_of(2);
            let grain = if threads == 1 { tiles } else { grain };
            Job {
                weight: product.weight,
                tail: product.tail,
                input: &inputs.forms[form].2,
                cols: inputs.cols,
                output: Output::new(product.out, tokens, rows, grain),
            }
        })
        .collect();
    context.team.run(&|| {
        for job in &jobs {
            while let Some(claim) = job.output.claim() {
                job.run(claim, context.level);
            }
        }
    });
}

/// A product that is being computed.
struct Job<'a> {
    weight: &'a Weight,
    tail: Tail<'a>,
    input: &'a Prepared,
    cols: usize,
    output: Output<'a>,
}

impl Job<'_> {
    fn run(&self, mut claim: Claim<'_>, level: Level) {
        self.multiply(&mut claim, level);
        if self.tail.side.is_some() || self.tail.bias.is_some() {
            let claim = &mut claim;
            let tail = self.tail;
            level.run(AddTail { tail, claim });
        }
    }

    fn multiply(&self, claim: &mut Claim<'_>, level: Level) {
        let blocks = self.cols.div_ceil(BLOCK);
        match (self.weight, self.input) {
            (Weight::Tiles { tiles, .. }, Prepared::Int8(data)) => {
                self.products::<Int8>(tiles, Tokens { blocks, data }, claim, level)
            }
            (Weight::Tiles { tiles, .. }, Prepared::Floats(data)) => {
                self.products::<Floats>(tiles, Tokens { blocks, data }, claim, level)
            }
            (
                Weight::Tiles { tiles, .. },
                input @ (Prepared::Transposed(_) | Prepared::Pairs(_)),
            ) => {
                struct Run<'a> {
                    tiles: &'a Tiles,
                    part: Part,
                    panel: &'a mut Panel,
                    level: Level,
                }
                impl WithFormat for Run<'_> {
                    type Output = ();
                    fn with<F: Format>(self, format: F) {
                        self.level.run(WidenTiles {
                            format,
                            tiles: self.tiles,
                            part: self.part,
                            panel: self.panel,
                        });
                    }
                }
                let widen = |part: Part, panel: &mut Panel| {
                    let run = Run {
                        tiles,
                        part,
                        panel,
                        level,
                    };
                    with_format(tiles.layout(), run);
                };
                self.panels(&widen, input, claim, level);
            }
            (Weight::Dense(dense), Prepared::Floats(data)) => level.run(Dense {
                float: dense.float(),
                rows: dense.rows,
                cols: dense.cols,
                data: dense.data(),
                x: Tokens { blocks, data },
                claim,
            }),
            (Weight::Dense(dense), input @ (Prepared::Transposed(_) | Prepared::Pairs(_))) => {
                let widen = |part: Part, panel: &mut Panel| {
                    level.run(WidenDense {
                        float: dense.float(),
                        rows: dense.rows,
                        cols: dense.cols,
                        data: dense.data(),
                        part,
                        panel,
                    });
                };
                self.panels(&widen, input, claim, level);
            }
            (Weight::Dense(_), Prepared::Int8(_)) => unreachable!("dense weights take floats"),
        }
    }

    fn panels(
        &self,
        widen: &dyn Fn(Part, &mut Panel),
        input: &Prepared,
        claim: &mut Claim<'_>,
        level: Level,
    ) {
        match input {
            Prepared::Transposed(x) => level.run(Panels { widen, x, claim }),
            Prepared::Pairs(x) => level.run(PairPanels {
                widen,
                x,
                level,
                claim,
            }),
            Prepared::Int8(_) | Prepared::Floats(_) => unreachable!("inputs of few tokens"),
        }
    }

    fn products<A: Arithmetic>(
        &self,
        tiles: &Tiles,
        x: Tokens<'_, A::Block>,
        claim: &mut Claim<'_>,
        level: Level,
    ) {
        struct Run<'a, 'c, A: Arithmetic> {
            tiles: &'a Tiles,
            x: Tokens<'a, A::Block>,
            claim: &'a mut Claim<'c>,
            level: Level,
        }
        impl<A: Arithmetic> WithFormat for Run<'_, '_, A> {
            type Output = ();
            fn with<F: Format>(self, format: F) {
                self.level.run(Products::<F, A> {
                    format,
                    tiles: self.tiles,
                    x: self.x,
                    claim: self.claim,
                });
            }
        }
        let run = Run::<A> {
            tiles,
            x,
            claim,
            level,
        };
        with_format(tiles.layout(), run);
    }
}
