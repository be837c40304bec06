//! A report as one HTML page that needs nothing but itself: styles inline, plots as inline SVG, no scripts.

use anyhow::{Context, Result};
use minijinja::{Environment, Value, context};

use crate::format;
use crate::report::{Report, Section};
use crate::row::{Role, Row};
use crate::table::{Grid, Head, command_line, facts, row_name};

const TEMPLATE: &str = include_str!("report.html.j2");

/// The text of `report.html`.
///
/// # Errors
/// A plot that cannot be drawn.
pub(crate) fn render(report: &Report) -> Result<String> {
    let mut env = Environment::new();
    // The name ends in .html so that the engine escapes what it inserts.
    env.add_template("report.html", TEMPLATE)
        .context("report template")?;
    let mut names: Vec<String> = Vec::new();
    for series in report
        .sections
        .iter()
        .flat_map(|s| &s.plots)
        .flat_map(|p| &p.series)
    {
        if !names.contains(&series.name) {
            names.push(series.name.clone());
        }
    }
    let sections = report
        .sections
        .iter()
        .map(|s| section(s, &names))
        .collect::<Result<Vec<Value>>>()?;
    let machine = &report.machine;
    let context = context! {
        command => report.command.iter().map(|word| command_line(std::slice::from_ref(word))).collect::<Vec<String>>(),
        about => [
            ("Processor", format!("{}, {} cores", machine.cpu, machine.cores)),
            ("Memory", format::bytes(machine.memory_bytes)),
            ("Device", report.device.clone()),
            ("Threads", report.threads.to_string()),
            ("Seed", report.seed.to_string()),
            ("Version", report.version.clone()),
        ].map(|(name, value)| context! { name, value }).to_vec(),
        sections,
    };
    env.get_template("report.html")
        .and_then(|template| template.render(context))
        .context("report.html")
}

fn section(section: &Section, names: &[String]) -> Result<Value> {
    let grid = Grid::new(section);
    let rows: Vec<Value> = grid
        .rows
        .iter()
        .enumerate()
        .map(|(i, row)| row_value(&grid, i, row))
        .collect();
    let plots = section
        .plots
        .iter()
        .map(|plot| Ok(context! { title => plot.title.clone(), svg => plot.svg(names)? }));
    Ok(context! {
        title => section.title.clone(),
        prose => section.prose.clone(),
        facts => facts(section).map(|(name, value)| context! { name, value }).collect::<Vec<Value>>(),
        heads => heads(&grid),
        rows,
        notes => grid.notes.clone(),
        plots => plots.collect::<Result<Vec<Value>>>()?,
        figures => section.figures.iter().map(|f| context! { caption => f.caption.clone(), svg => f.svg.clone() }).collect::<Vec<Value>>(),
        layers => section.rows.iter().filter_map(layers).collect::<Vec<Value>>(),
    })
}

fn row_value(grid: &Grid, i: usize, (role, cells): &(Role, Vec<String>)) -> Value {
    let cells: Vec<Value> = cells
        .iter()
        .zip(&grid.heads)
        .map(|(text, head)| context! { text => text.clone(), numeric => head.numeric })
        .collect();
    let class = match role {
        Role::Reference => "reference",
        Role::Control => "control",
        Role::Method => "",
    };
    context! { class, apart => grid.is_apart(i), cells }
}

/// The per-layer detail of a row as a table.
fn layers(measured: &Row) -> Option<Value> {
    let grid = Grid::of_layers(measured)?;
    let cells = |(_, cells): &(Role, Vec<String>)| -> Vec<Value> {
        let cell = |(text, head): (&String, &Head)| context! { text => text.clone(), numeric => head.numeric };
        cells.iter().zip(&grid.heads).map(cell).collect()
    };
    Some(
        context! { title => row_name(measured), heads => heads(&grid), rows => grid.rows.iter().map(cells).collect::<Vec<_>>() },
    )
}

fn heads(grid: &Grid) -> Vec<Value> {
    let head = |head: &Head| context! { title => head.title.clone(), numeric => head.numeric };
    grid.heads.iter().map(head).collect()
}
