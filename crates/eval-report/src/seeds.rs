//! Several runs of one cell of a table as one row.

use serde_json::{Map, Number, Value};

use crate::error::{Error, Result};
use crate::row::{KEYS, MemoryScope, Row, Spread, SpreadOver};

/// Fields of which the largest run counts: memory that all of them must fit into.
const MAXIMA: [&str; 5] = [
    "peak_rss_bytes",
    "kv_bytes",
    "kv_bytes_full",
    "state_bytes",
    "tokens_held",
];

/// The mean of rows that differ in their seed or input alone.
///
/// Every number that was measured becomes the mean of the runs that have it, and reals get their [`Spread`]; where not
/// all runs have it, a note says how many do. Where a run's number is not finite there is no mean, and a note says so.
/// Per-layer detail is averaged in the same way where the runs agree on its form, and dropped where they do not. Memory
/// is the largest of the runs, time their sum, notes are those of all. Settings and text are the first run's.
///
/// # Errors
/// [`Error::NoRuns`] for no rows.
pub fn mean_over_seeds(runs: &[Row]) -> Result<Row> {
    let first = runs.first().ok_or(Error::NoRuns)?;
    if runs.len() == 1 {
        return Ok(first.clone());
    }
    let fields = runs
        .iter()
        .map(Row::to_fields)
        .collect::<Result<Vec<Map<String, Value>>>>()?;
    let mut mean = fields[0].clone();
    let mut spreads: Vec<(String, Spread)> = Vec::new();
    let mut remarks = Vec::new();
    for name in measured(&fields) {
        let values: Vec<&Value> = fields.iter().filter_map(|row| row.get(&name)).collect();
        let lost = values.iter().filter(|value| value.is_null()).count();
        if lost > 0 {
            mean.remove(&name);
            remarks.push(format!(
                "{name}: not a finite number in {lost} of {} runs",
                runs.len()
            ));
            continue;
        }
        let numbers: Vec<f64> = values.iter().filter_map(|value| value.as_f64()).collect();
        if MAXIMA.contains(&name.as_str()) {
            if let Some(&largest) = values.iter().max_by(|a, b| number(a).total_cmp(&number(b))) {
                mean.insert(name, largest.clone());
            }
            continue;
        }
        if numbers.len() < runs.len() {
            remarks.push(format!(
                "{name}: mean over {} of {} runs",
                numbers.len(),
                runs.len()
            ));
        }
        let is_count = values.iter().all(|value| value.is_u64());
        if let Some(spread) = spread(&name, &numbers, runs)
            && !(is_count && spread.min == spread.max)
        {
            spreads.push((name.clone(), spread));
        }
        mean.insert(name, average(&values));
    }
    let layers: Vec<Value> = runs.iter().map(|row| row.layers.clone().into()).collect();
    let layers: Vec<&Value> = layers.iter().collect();
    mean.remove("layers");
    let mut mean = Row::from_fields(mean)?;
    if let Some(Value::Array(layers)) = average_of_form(&layers) {
        mean.layers = layers;
    }
    mean.seconds = runs.iter().map(|row| row.seconds).sum();
    if runs
        .iter()
        .any(|row| row.peak_rss_scope == MemoryScope::Process)
    {
        mean.peak_rss_scope = MemoryScope::Process;
    }
    mean.spread = spreads.into_iter().collect();
    for note in runs.iter().flat_map(|row| &row.notes) {
        if !mean.notes.contains(note) {
            mean.notes.push(note.clone());
        }
    }
    mean.notes.extend(remarks);
    Ok(mean)
}

/// Names of all measured numbers, null where one is not finite, in the order of the fields.
fn measured(runs: &[Map<String, Value>]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for (name, value) in runs.iter().flatten() {
        let is_measured = (value.is_number() || value.is_null())
            && !KEYS.contains(&name.as_str())
            && name != "seconds";
        if is_measured && !names.contains(name) {
            names.push(name.clone());
        }
    }
    names
}

/// The spread of a field over runs; of one that each run measured several times, over all of these measurements.
fn spread(name: &str, values: &[f64], runs: &[Row]) -> Option<Spread> {
    let own: Vec<&Spread> = runs.iter().filter_map(|row| row.spread.get(name)).collect();
    if own.is_empty() {
        return Spread::of(values, SpreadOver::Seeds);
    }
    let ends: Vec<f64> = own.iter().flat_map(|own| [own.min, own.max]).collect();
    let all = [values, &ends].concat();
    Spread::of(&all, own[0].over).map(|spread| Spread {
        runs: own.iter().map(|own| own.runs).sum(),
        ..spread
    })
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NEG_INFINITY)
}

/// The mean of numbers; equal ones are their own mean to the last bit.
fn mean(values: &[&Value]) -> f64 {
    let mut numbers = values.iter().filter_map(|value| value.as_f64());
    let first = numbers.next().unwrap_or(f64::NAN);
    first + numbers.map(|number| number - first).sum::<f64>() / values.len() as f64
}

/// The mean of numbers: a count where all of them are counts, for fields that hold nothing else.
fn average(values: &[&Value]) -> Value {
    let mean = mean(values);
    if values.iter().all(|value| value.is_u64()) {
        return Value::from(mean.round() as u64);
    }
    Number::from_f64(mean).map_or(Value::Null, Value::Number)
}

/// The mean of values of the same form, number by number; `None` where the forms differ.
fn average_of_form(values: &[&Value]) -> Option<Value> {
    let (first, others) = values.split_first()?;
    if others.iter().all(|other| other == first) {
        return Some((*first).clone());
    }
    match first {
        Value::Number(_) if others.iter().all(|other| other.is_number()) => {
            Number::from_f64(mean(values)).map(Value::Number)
        }
        Value::Array(items) => {
            let arrays = values.iter().map(|value| value.as_array());
            let arrays: Vec<&Vec<Value>> = arrays.collect::<Option<_>>()?;
            if arrays.iter().any(|array| array.len() != items.len()) {
                return None;
            }
            (0..items.len())
                .map(|i| average_of_form(&arrays.iter().map(|a| &a[i]).collect::<Vec<_>>()))
                .collect::<Option<Vec<Value>>>()
                .map(Value::Array)
        }
        Value::Object(items) => {
            let objects = values.iter().map(|value| value.as_object());
            let objects: Vec<&Map<String, Value>> = objects.collect::<Option<_>>()?;
            if objects.iter().any(|object| object.len() != items.len()) {
                return None;
            }
            let of = |name: &String| -> Option<(String, Value)> {
                let values: Option<Vec<&Value>> = objects.iter().map(|o| o.get(name)).collect();
                Some((name.clone(), average_of_form(&values?)?))
            };
            let means: Option<Map<String, Value>> = items.keys().map(of).collect();
            means.map(Value::Object)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn run(perplexity: f64, nll: Option<f64>) -> Row {
        Row {
            perplexity: Some(perplexity),
            nll,
            ratio: Some(0.25),
            seconds: 1.0,
            ..Row::new("kv", "random")
        }
    }

    #[test]
    fn a_mean_has_its_range_and_settings_have_none() {
        let row = mean_over_seeds(&[run(2.0, None), run(4.0, None)]).unwrap();
        assert_eq!((row.perplexity, row.seconds), (Some(3.0), 2.0));
        assert_eq!(row.ratio, Some(0.25));
        let spread = row.spread["perplexity"];
        assert_eq!((spread.runs, spread.min, spread.max), (2, 2.0, 4.0));
        assert_eq!(row.spread.len(), 1);
    }

    #[test]
    fn a_mean_over_fewer_runs_says_so() {
        let runs = [run(2.0, None), run(4.0, Some(1.0)), run(6.0, Some(2.0))];
        for runs in [
            runs.to_vec(),
            // The first run has no part in which values count.
            runs.iter().rev().cloned().collect(),
        ] {
            let row = mean_over_seeds(&runs).unwrap();
            assert_eq!((row.perplexity, row.nll), (Some(4.0), Some(1.5)));
            assert_eq!(row.spread["nll"].runs, 2);
            assert_eq!(row.notes, ["nll: mean over 2 of 3 runs"]);
        }
    }

    #[test]
    fn a_value_that_no_run_has_is_absent() {
        let row = mean_over_seeds(&[run(2.0, None), run(4.0, None)]).unwrap();
        assert_eq!(row.nll, None);
        assert!(!row.spread.contains_key("nll") && row.notes.is_empty());
    }

    #[test]
    fn a_run_that_diverged_is_not_left_out_of_the_mean() {
        let row = mean_over_seeds(&[run(2.0, None), run(f64::INFINITY, None)]).unwrap();
        assert_eq!(row.perplexity, None);
        assert!(!row.spread.contains_key("perplexity"));
        assert_eq!(
            row.notes,
            ["perplexity: not a finite number in 1 of 2 runs"]
        );
    }

    #[test]
    fn memory_is_that_of_the_largest_run_and_counts_stay_counts() {
        let with = |peak: u64, bytes: u64, scope| Row {
            peak_rss_bytes: Some(peak),
            peak_rss_scope: scope,
            bytes: Some(bytes),
            ..Row::new("kv", "random")
        };
        let small = with(10, 3, MemoryScope::Row);
        let row = mean_over_seeds(&[small.clone(), with(30, 4, MemoryScope::Process)]).unwrap();
        assert_eq!((row.peak_rss_bytes, row.bytes), (Some(30), Some(4)));
        assert_eq!(row.peak_rss_scope, MemoryScope::Process);
        assert!(!row.spread.contains_key("peak_rss_bytes"));
    }

    #[test]
    fn repeated_measurements_of_every_run_make_one_spread() {
        let with = |speed: f64, min: f64, max: f64| {
            let mut row = Row {
                tokens_per_second: Some(speed),
                ..Row::new("structured", "random")
            };
            let spread = Spread {
                runs: 3,
                min,
                max,
                over: SpreadOver::Repeats,
            };
            row.spread.insert("tokens_per_second".into(), spread);
            row
        };
        let row = mean_over_seeds(&[with(10.0, 9.0, 12.0), with(14.0, 13.0, 15.0)]).unwrap();
        let spread = row.spread["tokens_per_second"];
        assert_eq!(row.tokens_per_second, Some(12.0));
        assert_eq!((spread.runs, spread.min, spread.max), (6, 9.0, 15.0));
        assert_eq!(spread.over, SpreadOver::Repeats);
    }

    #[test]
    fn layers_and_extra_numbers_are_averaged_and_layers_of_other_forms_dropped() {
        let with = |layers: Value, kl: f64| {
            let mut row = Row::new("structured", "tyr");
            row.layers = layers.as_array().unwrap().clone();
            row.extra.insert("kl".into(), json!(kl));
            row.extra.insert("loads_in".into(), json!("stock"));
            row
        };
        let layer = |neurons: u64| json!([{"layer": 0, "neurons": neurons}]);
        let row = mean_over_seeds(&[with(layer(3), 1.0), with(layer(4), 2.0)]).unwrap();
        assert_eq!(row.layers, [json!({"layer": 0, "neurons": 3.5})]);
        assert_eq!(
            (&row.extra["kl"], &row.extra["loads_in"]),
            (&json!(1.5), &json!("stock"))
        );
        let row = mean_over_seeds(&[with(layer(3), 1.0), with(json!([]), 2.0)]).unwrap();
        assert!(row.layers.is_empty());
    }
}
