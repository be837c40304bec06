//! Line plots as SVG that takes its colours from the page around it.
//!
//! Text and axes are drawn in `currentColor`, series in the CSS variables `--series-0` to `--series-7`, so one drawing is
//! legible on light and on dark pages. Series differ by marker as well as by colour. Where there are more than eight, the
//! colours repeat with long dashes, then with dots. Baselines have short dashes.

mod axis;

use plotters::coord::Shift;
use plotters::coord::ranged1d::Ranged;
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use self::axis::Coordinate;
use crate::error::{Error, Result};
use crate::plot::{Axis, Plot, Point, Scale};

type Canvas<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Width of the drawing in its own units, which the page scales, and its height below the legend.
const WIDTH: u32 = 480;
const HEIGHT: u32 = 300;
const TEXT_SIZE: u32 = 17;
const LEGEND_LEFT: i32 = 8;
const LEGEND_LINE: i32 = 22;
const SWATCH: i32 = 34;

/// Stand-ins that plotters can draw with, replaced by what a page can set. No other colour is ever drawn.
const INK: RGBColor = RGBColor(1, 0, 0);
const GRID: RGBColor = RGBColor(2, 0, 0);
const SERIES: RGBColor = RGBColor(3, 0, 0);
/// Colours of series; the page has as many.
const COLORS: u8 = 8;

/// A single dash, longer than any line in the drawing.
const SOLID: (u32, u32) = (100 * (WIDTH + HEIGHT), 0);
/// Lengths of dash and gap of a series by how often the colours have been used up before it.
const ROUNDS: [(u32, u32); 3] = [SOLID, (24, 5), (3, 3)];
/// Those of a control.
const CONTROL: (u32, u32) = (7, 5);

/// The outlines of markers around (0, 0).
const MARKERS: [&[(i32, i32)]; 5] = [
    &[
        (5, 2),
        (2, 5),
        (-2, 5),
        (-5, 2),
        (-5, -2),
        (-2, -5),
        (2, -5),
        (5, -2),
    ],
    &[(-4, -4), (4, -4), (4, 4), (-4, 4)],
    &[(0, -6), (6, 4), (-6, 4)],
    &[(0, -6), (6, 0), (0, 6), (-6, 0)],
    &[(0, 6), (6, -4), (-6, -4)],
];

/// How a line looks. Everything follows from a series' number and whether it is a control: of the first twenty-four no two have the same colour and
/// dash, of the first forty no two the same colour and marker.
#[derive(Clone, Copy)]
struct Look {
    color: RGBColor,
    marker: Option<&'static [(i32, i32)]>,
    /// Lengths of dash and gap.
    dash: (u32, u32),
}

impl Look {
    const REFERENCE: Look = Look {
        color: INK,
        marker: None,
        dash: (2, 4),
    };

    fn of_series(number: usize, control: bool) -> Self {
        let round = number / usize::from(COLORS);
        Look {
            color: RGBColor(SERIES.0, 0, number as u8 % COLORS),
            marker: Some(MARKERS[(number + round) % MARKERS.len()]),
            dash: if control {
                CONTROL
            } else {
                ROUNDS[round % ROUNDS.len()]
            },
        }
    }

    fn line<C: Clone>(self, points: Vec<C>) -> DashedPathElement<std::vec::IntoIter<C>, u32> {
        let (dash, gap) = self.dash;
        DashedPathElement::new(points, dash, gap, self.color.stroke_width(2))
    }
}

/// Text in the page's font and colour.
fn text() -> TextStyle<'static> {
    TextStyle::from(("inherit", TEXT_SIZE)).color(&INK)
}

impl Plot {
    /// The plot as an inline `<svg>` element. The colour and marker of a series follow from the position of its name in
    /// `names`, or from its position in the plot if it is not among them.
    ///
    /// # Errors
    /// [`Error::EmptyPlot`] and [`Error::NotPositive`], which name the plot.
    pub fn svg(&self, names: &[String]) -> Result<String> {
        if self.xs().next().is_none() {
            return Err(Error::EmptyPlot {
                title: self.title.clone(),
            });
        }
        let refused = |axis: &Axis, value: f64| axis.scale == Scale::Log && value <= 0.0;
        let xs = self.xs().map(|value| (&self.x, value));
        let ys = self.ys().map(|value| (&self.y, value));
        if let Some((axis, value)) = xs.chain(ys).find(|(axis, value)| refused(axis, *value)) {
            return Err(Error::NotPositive {
                title: self.title.clone(),
                axis: axis.title.clone(),
                value,
            });
        }
        svg(self, names)
    }
}

fn svg(plot: &Plot, names: &[String]) -> Result<String> {
    let number = |i: usize, name: &String| names.iter().position(|n| n == name).unwrap_or(i);
    let series = plot.series.iter().enumerate();
    let looks: Vec<Look> = series
        .map(|(i, s)| Look::of_series(number(i, &s.name), s.control))
        .collect();
    let legend = legend(plot, &looks);
    let height = HEIGHT + legend_height(&legend);

    let mut svg = String::new();
    let canvas = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
    draw(plot, &looks, &legend, &canvas).map_err(|error| Error::Draw {
        title: plot.title.clone(),
        reason: error.to_string(),
    })?;
    drop(canvas);

    let hex = |RGBColor(r, g, b)| format!("#{r:02X}{g:02X}{b:02X}");
    svg = svg
        .replace(&hex(INK), "currentColor")
        .replace(&hex(GRID), "var(--grid, #8886)");
    for i in 0..COLORS {
        let color = hex(RGBColor(SERIES.0, 0, i));
        svg = svg.replace(&color, &format!("var(--series-{i}, currentColor)"));
    }
    // The page sets the size; the name space is not needed within HTML, and would be a link to elsewhere.
    let fixed = format!("width=\"{WIDTH}\" height=\"{height}\" ");
    let name_space = " xmlns=\"http://www.w3.org/2000/svg\"";
    Ok(svg
        .replacen(&fixed, "", 1)
        .replacen(name_space, " role=\"img\"", 1))
}

fn draw(
    plot: &Plot,
    looks: &[Look],
    legend: &[Entry],
    canvas: &Canvas,
) -> Result<(), Box<dyn std::error::Error>> {
    let style = text().pos(Pos::new(HPos::Left, VPos::Center));
    for &Entry { name, look, x, y } in legend {
        canvas.draw(&look.line(vec![(x, y), (x + SWATCH, y)]))?;
        let marker = look.marker.unwrap_or_default();
        canvas.draw(&(EmptyElement::at((x + SWATCH / 2, y)) + Polygon::new(marker, look.color)))?;
        canvas.draw(&Text::new(name, (x + SWATCH + 8, y), style.clone()))?;
    }
    let x = Coordinate::of_settings(plot.xs(), plot.x.scale);
    let y = Coordinate::of_measurements(plot.ys(), plot.y.scale);
    let width = x.range();
    let mut chart = ChartBuilder::on(canvas)
        .margin_top(legend_height(legend) + 8)
        .margin_right(16)
        .x_label_area_size(54)
        .y_label_area_size(70)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .axis_style(GRID)
        .label_style(text())
        .axis_desc_style(text())
        .x_desc(&plot.x.title)
        .y_desc(&plot.y.title)
        .draw()?;
    if let Some(reference) = &plot.reference {
        let ends = vec![(width.start, reference.y), (width.end, reference.y)];
        chart.draw_series([Look::REFERENCE.line(ends)])?;
    }
    for (series, look) in plot.series.iter().zip(looks) {
        chart.draw_series(
            band(&series.points).map(|outline| Polygon::new(outline, look.color.mix(0.18))),
        )?;
    }
    for (series, look) in plot.series.iter().zip(looks) {
        let points: Vec<(f64, f64)> = series.points.iter().map(|p| (p.x, p.y)).collect();
        chart.draw_series([look.line(points.clone())])?;
        let marker = look.marker.unwrap_or_default();
        chart.draw_series(
            points
                .iter()
                .map(|p| EmptyElement::at(*p) + Polygon::new(marker, look.color)),
        )?;
    }
    canvas.present()?;
    Ok(())
}

/// The outline of the area between the smallest and the largest values, if any point has them.
fn band(points: &[Point]) -> Option<Vec<(f64, f64)>> {
    points.iter().any(|p| p.band.is_some()).then(|| {
        let ends = |p: &Point| p.band.unwrap_or((p.y, p.y));
        let there = points.iter().map(|p| (p.x, ends(p).0));
        there
            .chain(points.iter().rev().map(|p| (p.x, ends(p).1)))
            .collect()
    })
}

/// A name in the legend, and where its line begins.
struct Entry<'a> {
    name: &'a str,
    look: Look,
    x: i32,
    y: i32,
}

fn legend_height(legend: &[Entry]) -> u32 {
    legend
        .last()
        .map_or(0, |entry| (entry.y + LEGEND_LINE / 2) as u32)
}

/// Where the entries of the legend stand above the plot, in as many lines as they need.
fn legend<'a>(plot: &'a Plot, looks: &[Look]) -> Vec<Entry<'a>> {
    let series = plot
        .series
        .iter()
        .map(|s| s.name.as_str())
        .zip(looks.iter().copied());
    let reference = plot
        .reference
        .iter()
        .map(|r| (r.name.as_str(), Look::REFERENCE));
    let (mut x, mut y) = (LEGEND_LEFT, LEGEND_LINE / 2);
    let mut entries = Vec::new();
    for (name, look) in series.chain(reference) {
        // Without a font at hand, a width that few fonts exceed.
        let width = SWATCH + 20 + name.chars().count() as i32 * TEXT_SIZE as i32 / 2;
        if x > LEGEND_LEFT && x + width > WIDTH as i32 {
            (x, y) = (LEGEND_LEFT, y + LEGEND_LINE);
        }
        entries.push(Entry { name, look, x, y });
        x += width;
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plot::{Reference, Series};

    fn plot() -> Plot {
        let line = |name: &str, control: bool, y: f64| {
            let point = |x: f64| Point {
                x,
                y: y * x,
                band: control.then_some((y * x * 0.9, y * x * 1.1)),
            };
            Series {
                name: name.into(),
                points: [0.1, 0.2, 0.4].map(point).to_vec(),
                control,
            }
        };
        Plot {
            title: "Perplexity".into(),
            x: Axis::linear("pruning ratio"),
            y: Axis::log("perplexity (exp nats/token)"),
            series: vec![line("flap", false, 10.0), line("a<b>&c", true, 30.0)],
            reference: Some(Reference {
                name: "dense".into(),
                y: 3.0,
            }),
        }
    }

    #[test]
    fn axes_have_titles_and_series_stand_in_the_legend() {
        let svg = plot().svg(&[]).unwrap();
        for text in [
            "pruning ratio",
            "perplexity (exp nats/token)",
            "flap",
            "a&lt;b&gt;&amp;c",
            "dense",
            "0.4",
        ] {
            assert!(
                svg.lines().any(|line| line == text),
                "{text} missing in {svg}"
            );
        }
    }

    #[test]
    fn every_colour_follows_the_page() {
        let svg = plot().svg(&[]).unwrap();
        for attribute in ["fill=\"", "stroke=\""] {
            for color in svg
                .split(attribute)
                .skip(1)
                .map(|rest| rest.split('"').next().unwrap())
            {
                assert!(
                    ["none", "currentColor"].contains(&color) || color.starts_with("var(--"),
                    "{color}"
                );
            }
        }
        assert!(svg.contains("var(--series-0,") && svg.contains("var(--series-1,"));
    }

    #[test]
    fn a_name_keeps_its_colour_from_plot_to_plot() {
        let mut plot = plot();
        plot.series.truncate(1);
        let names = ["random", "x", "flap"].map(String::from);
        let svg = plot.svg(&names).unwrap();
        assert!(svg.contains("var(--series-2,") && !svg.contains("var(--series-0,"));
    }

    #[test]
    fn a_control_is_dashed_and_a_method_is_not() {
        let lines = |control| {
            let mut plot = plot();
            plot.series.truncate(1);
            plot.series[0].control = control;
            plot.svg(&[])
                .unwrap()
                .matches("stroke=\"var(--series-0,")
                .count()
        };
        // One path in the plot and one in the legend, against many dashes.
        assert_eq!(lines(false), 2);
        assert!(lines(true) > 10, "{}", lines(true));
    }

    #[test]
    fn twenty_four_series_differ_in_colour_or_dash() {
        let look = |number| {
            let Look { color, dash, .. } = Look::of_series(number, false);
            (color.2, dash)
        };
        let looks: std::collections::BTreeSet<_> = (0..24).map(look).collect();
        assert_eq!(looks.len(), 24);
        assert!(looks.iter().all(|&(_, dash)| dash != CONTROL));
    }

    #[test]
    fn a_log_axis_refuses_what_it_cannot_show_and_an_empty_plot_is_an_error() {
        let mut zero = plot();
        zero.series[0].points[1].y = 0.0;
        let error = zero.svg(&[]).unwrap_err().to_string();
        assert_eq!(
            error,
            "plot \"Perplexity\": axis \"perplexity (exp nats/token)\" is logarithmic and cannot show 0"
        );
        let empty = Plot {
            series: vec![],
            ..plot()
        };
        assert_eq!(
            empty.svg(&[]).unwrap_err().to_string(),
            "plot \"Perplexity\" has no points"
        );
    }

    #[test]
    fn a_single_point_can_be_drawn() {
        let mut single = plot();
        single.series.truncate(1);
        single.series[0].points.truncate(1);
        single.svg(&[]).unwrap();
    }
}
