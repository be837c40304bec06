//! Line plots as SVG that takes its colours from the page around it.
//!
//! Text and axes are drawn in `currentColor`, series in the CSS variables `--series-0` to `--series-7`, so that one
//! drawing is legible on light and on dark pages. Series differ by marker as well as by colour; where there are more than eight, the
//! colours come again with long dashes, then with dots. Controls have short dashes. Points that were not measured at every setting are simply fewer.

mod axis;
mod draw;

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::row::{Role, Row};

/// Spacing of an axis.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scale {
    /// Equal differences.
    #[default]
    Linear,
    /// Equal ratios; every value must be above zero.
    Log,
}

/// An axis with its title, which names the unit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Axis {
    /// Quantity and unit, such as `KV cache (MiB)`.
    pub title: String,
    /// Spacing.
    pub scale: Scale,
}

impl Axis {
    /// A linear axis.
    pub fn linear(title: impl Into<String>) -> Self {
        Axis {
            title: title.into(),
            scale: Scale::Linear,
        }
    }

    /// A logarithmic axis.
    pub fn log(title: impl Into<String>) -> Self {
        Axis {
            title: title.into(),
            scale: Scale::Log,
        }
    }
}

/// A measured point, with the smallest and largest y of repeated runs where there were several.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Setting.
    pub x: f64,
    /// Measurement.
    pub y: f64,
    /// Smallest and largest y over repeated runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub band: Option<(f64, f64)>,
}

impl From<(f64, f64)> for Point {
    fn from((x, y): (f64, f64)) -> Self {
        Point { x, y, band: None }
    }
}

impl Point {
    fn ys(&self) -> impl Iterator<Item = f64> {
        std::iter::once(self.y).chain(self.band.into_iter().flat_map(|(min, max)| [min, max]))
    }
}

/// The points of one method, in the order in which they are joined.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// Name in the legend; the same name has the same colour in all plots of a report.
    pub name: String,
    /// Points.
    pub points: Vec<Point>,
    /// Whether this is a control, drawn dashed.
    #[serde(default)]
    pub control: bool,
}

impl Series {
    /// A series for each method of `rows`, in the order of their first rows and without the reference, through the
    /// points where both `x` and `y` were measured. Bands are the spread of the row's `field`, which `y` reads.
    pub fn by_method(
        rows: &[Row],
        x: impl Fn(&Row) -> Option<f64>,
        field: &str,
        y: impl Fn(&Row) -> Option<f64>,
    ) -> Vec<Series> {
        let mut all: Vec<Series> = Vec::new();
        for row in rows.iter().filter(|row| row.role != Role::Reference) {
            let (Some(x), Some(y)) = (x(row), y(row)) else {
                continue;
            };
            let band = row.spread.get(field).map(|spread| (spread.min, spread.max));
            let point = Point { x, y, band };
            match all.iter_mut().find(|series| series.name == row.method) {
                Some(series) => series.points.push(point),
                None => all.push(Series {
                    name: row.method.clone(),
                    points: vec![point],
                    control: row.role == Role::Control,
                }),
            }
        }
        all
    }
}

/// A horizontal line to compare with, such as the dense model's perplexity.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Reference {
    /// Name in the legend.
    pub name: String,
    /// Height.
    pub y: f64,
}

/// A line plot.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Plot {
    /// Heading.
    pub title: String,
    /// Horizontal axis.
    pub x: Axis,
    /// Vertical axis.
    pub y: Axis,
    /// Lines.
    pub series: Vec<Series>,
    /// A horizontal line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<Reference>,
}

impl Plot {
    /// The plot as an inline `<svg>` element. The colour and marker of a series follow from the place of its name in
    /// `names`, or from its place in the plot if it is not among them.
    ///
    /// # Errors
    /// No point to draw, or a value that is not above zero on a logarithmic axis; both name the plot.
    pub fn svg(&self, names: &[String]) -> Result<String> {
        ensure!(
            self.xs().next().is_some(),
            "plot {:?} has no point to draw",
            self.title
        );
        let refused = |axis: &Axis, value: f64| axis.scale == Scale::Log && value <= 0.0;
        let xs = self.xs().map(|value| (&self.x, value));
        let ys = self.ys().map(|value| (&self.y, value));
        if let Some((axis, value)) = xs.chain(ys).find(|(axis, value)| refused(axis, *value)) {
            bail!(
                "plot {:?}: {} is logarithmic and cannot show {value}",
                self.title,
                axis.title
            );
        }
        draw::svg(self, names)
    }

    /// Make a plot of whatever was measured drawable: points that are not finite have no place on an axis and are left
    /// out (their rows say so), and an axis that cannot be logarithmic becomes linear. False if no point is left.
    pub(crate) fn settle(&mut self) -> bool {
        for series in &mut self.series {
            series
                .points
                .retain(|p| p.x.is_finite() && p.ys().all(f64::is_finite));
        }
        self.reference.take_if(|r| !r.y.is_finite());
        if self.xs().any(|x| x <= 0.0) {
            self.x.scale = Scale::Linear;
        }
        if self.ys().any(|y| y <= 0.0) {
            self.y.scale = Scale::Linear;
        }
        self.xs().next().is_some()
    }

    fn points(&self) -> impl Iterator<Item = &Point> {
        self.series.iter().flat_map(|s| &s.points)
    }

    fn xs(&self) -> impl Iterator<Item = f64> {
        self.points().map(|p| p.x)
    }

    fn ys(&self) -> impl Iterator<Item = f64> {
        self.points()
            .flat_map(Point::ys)
            .chain(self.reference.iter().map(|r| r.y))
    }
}
