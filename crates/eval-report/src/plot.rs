//! Line plots as data. [`Plot::svg`] draws them.

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
    /// Whether this is a baseline, drawn dashed.
    #[serde(default)]
    pub control: bool,
}

impl Series {
    /// A series for each method of `rows`, in the order of their first rows and without the reference, through the
    /// points where both `x` and `y` were measured. Bands are the spread of the field named `field`, which `y` reads.
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
    /// Make the plot drawable: points that are not finite are left out (the notes of their rows name them), and an axis
    /// with values of zero or less becomes linear. False if no point is left.
    pub(crate) fn make_drawable(&mut self) -> bool {
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

    pub(crate) fn xs(&self) -> impl Iterator<Item = f64> {
        self.points().map(|p| p.x)
    }

    pub(crate) fn ys(&self) -> impl Iterator<Item = f64> {
        self.points()
            .flat_map(Point::ys)
            .chain(self.reference.iter().map(|r| r.y))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_a_series_for_each_method_without_the_reference() {
        use crate::row::{DENSE, Row, Spread};
        let row = |method, ratio, perplexity| Row {
            ratio,
            perplexity,
            ..Row::new("s", method)
        };
        let mut random = row("random", Some(0.1), Some(9.0)).control();
        let spread = Spread::of(&[8.0, 10.0], Default::default()).unwrap();
        random.spread.insert("perplexity".into(), spread);
        let rows = [
            row(DENSE, None, Some(3.0)),
            row("flap", Some(0.2), Some(5.0)),
            random,
            row("flap", Some(0.1), Some(4.0)),
            row("flap", Some(0.3), None),
        ];
        let series = Series::by_method(&rows, |r| r.ratio, "perplexity", |r| r.perplexity);
        assert_eq!(series.len(), 2);
        assert_eq!(
            series[0].points,
            [Point::from((0.2, 5.0)), Point::from((0.1, 4.0))]
        );
        assert_eq!((series[0].control, series[1].control), (false, true));
        assert_eq!(series[1].points[0].band, Some((8.0, 10.0)));
    }
}
