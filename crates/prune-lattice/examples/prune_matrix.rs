//! Masks a recurrent matrix from a safetensors file by order and prints what the order looked like; writes its picture.
//!
//! `cargo run -p prune-lattice --example prune_matrix -- FILE TENSOR CELL LAYOUT SPARSITY [ORDER.svg]`
//! e.g. `... -- model.safetensors lstm.weight_hh_l0 lstm pytorch 0.75 order.svg`

use prune_lattice::{
    Cell, GateLayout,
    hasse::Diagram,
    influence::{Aggregate, Influence},
    io,
    order::{Criterion, Cut, OrderMode, Poset, default_cuts, persistence, thresholds},
    prune::{Method, PruneConfig, prune_matrix},
};
use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [file, tensor, cell, layout, sparsity, rest @ ..] = args.as_slice() else {
        return Err("usage: prune_matrix FILE TENSOR CELL LAYOUT SPARSITY [ORDER.svg]".into());
    };
    let (cell, layout): (Cell, GateLayout) = (cell.parse()?, layout.parse()?);
    let tensors = io::load(Path::new(file))?;
    let w_hh = tensors
        .get(tensor)
        .ok_or_else(|| format!("{file} has no tensor {tensor}"))?;

    let mask = prune_matrix(
        w_hh,
        cell,
        layout,
        &PruneConfig::new(Method::LatticeContext, sparsity.parse()?),
    )?;
    println!(
        "kept {} of {} weights",
        mask.sum_all()?.to_scalar::<f32>()?,
        mask.elem_count()
    );

    let influence = Influence::from_tensor(w_hh, cell, layout, Aggregate::L2)?;
    for mode in [OrderMode::Context, OrderMode::Reachability] {
        println!("{mode:?}:");
        match persistence(&influence, &default_cuts(), Criterion::new(mode)) {
            Ok(p) => p
                .cuts
                .iter()
                .for_each(|c| println!("  {:.2} edges a neuron: {:?}", c.mean_out_degree, c.order)),
            Err(e) => println!("  {e}"),
        }
    }
    if let [svg] = rest {
        let threshold = thresholds(&influence, &[Cut::Degree(1.0)])?[0];
        let diagram = Diagram::of(&Poset::of_digraph(&influence.digraph(threshold)));
        std::fs::write(svg, diagram.svg())?;
        println!(
            "{svg}: {} elements, {} covers, {} layers",
            diagram.nodes.len(),
            diagram.covers.len(),
            diagram.layers
        );
    }
    Ok(())
}
