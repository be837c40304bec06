//! Router rows that share a stored expert, or stand for a constant.

use super::{WIDTHS_KEY, invalid};
use crate::Result;
use serde_json::Value;
use std::sync::Arc;

/// The list in [`WIDTHS_KEY`] that has the maps.
pub const EXPERT_MAP: &str = "expert_map";

/// What each router row of a block stands for, where that is not the stored expert of its number.
///
/// An id below the number of stored experts is that expert; several rows may have the same (tied merges), and a token that
/// chooses two of them adds up their gates. The ids behind are constants: `experts + j` is row `j` of the block's novices,
/// which stands in the place of an expert's output whatever the token is (MoNE, arXiv 2507.00390).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertMap {
    ids: Arc<[usize]>,
    experts: usize,
    constants: usize,
}

impl ExpertMap {
    /// From the id of each router row, and the number of stored experts.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) for ids without a row: each stored expert and each constant
    /// needs one, and constants are numbered without a gap.
    pub fn new(ids: Vec<usize>, experts: usize) -> Result<Self> {
        let rows = ids.len();
        let most = ids.iter().max().map_or(0, |&most| most.saturating_add(1));
        let count = most.max(experts);
        if count > rows {
            return Err(invalid(
                WIDTHS_KEY,
                format!(
                    "{EXPERT_MAP} has {rows} entries for ids below {count}, each of which needs one"
                ),
            ));
        }
        let mut has_row = vec![false; count];
        ids.iter().for_each(|&id| has_row[id] = true);
        if let Some(id) = has_row.iter().position(|&has_row| !has_row) {
            let reason =
                format!("{EXPERT_MAP} has ids below {count}, but {id} is none of its entries");
            return Err(invalid(WIDTHS_KEY, reason));
        }
        Ok(Self {
            ids: ids.into(),
            experts,
            constants: count - experts,
        })
    }

    /// The id of each router row.
    pub fn ids(&self) -> &[usize] {
        &self.ids
    }

    /// Number of router rows.
    pub fn rows(&self) -> usize {
        self.ids.len()
    }

    /// Number of stored experts.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Number of constants.
    pub fn constants(&self) -> usize {
        self.constants
    }

    /// Whether every row is the expert of its number.
    pub fn is_identity(&self) -> bool {
        self.rows() == self.experts && self.ids.iter().enumerate().all(|(row, &id)| row == id)
    }
}

/// The lists of ids of a config, one for each layer.
pub(super) fn lists(value: &Value, layers: usize, most: usize) -> Result<Vec<Vec<usize>>> {
    let wrong = |reason: String| invalid(WIDTHS_KEY, format!("{EXPERT_MAP} {reason}"));
    let lists = value.as_array().filter(|lists| lists.len() == layers);
    let lists = lists.ok_or_else(|| {
        wrong(format!(
            "must be a list of {layers} lists of ids, one for each layer"
        ))
    })?;
    let list = |(layer, list): (usize, &Value)| {
        let ids = list.as_array().and_then(|ids| {
            let id = |id: &Value| usize::try_from(id.as_u64()?).ok();
            ids.iter().map(id).collect::<Option<Vec<usize>>>()
        });
        ids.filter(|ids| ids.len() <= most)
            .ok_or_else(|| wrong(format!("of layer {layer} must be at most {most} ids")))
    };
    lists.iter().enumerate().map(list).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_behind_the_experts_are_constants() {
        let map = ExpertMap::new(vec![0, 2, 1, 0, 3], 2).unwrap();
        assert_eq!((map.rows(), map.experts(), map.constants()), (5, 2, 2));
        assert!(!map.is_identity());
        assert!(ExpertMap::new(vec![0, 1, 2], 3).unwrap().is_identity());
        // As many rows as experts, in another order.
        assert!(!ExpertMap::new(vec![1, 0, 2], 3).unwrap().is_identity());
        assert!(!ExpertMap::new(vec![0, 1, 2], 2).unwrap().is_identity());
    }

    #[test]
    fn ids_without_a_row_are_refused() {
        for (ids, experts, said) in [
            (vec![0, 0, 1], 4, "3 entries for ids below 4"),
            (vec![0, 0, 9], 2, "3 entries for ids below 10"),
            (vec![0, usize::MAX, 1], 2, "3 entries"),
            (vec![0, 0, 2, 0], 2, "1 is none of its entries"),
            (vec![0, 1, 3, 0], 2, "2 is none of its entries"),
        ] {
            let error = ExpertMap::new(ids, experts).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn lists_that_are_no_ids_name_the_layer() {
        let read = |value: Value| lists(&value, 2, 4).map_err(|error| error.to_string());
        assert_eq!(
            read(serde_json::json!([[0, 1], []])).unwrap(),
            [vec![0, 1], vec![]]
        );
        for (value, said) in [
            (serde_json::json!([[0]]), "2 lists"),
            (serde_json::json!(7), "2 lists"),
            (serde_json::json!([[0], [-1]]), "layer 1"),
            (serde_json::json!([[0, 1, 2, 3, 4], []]), "layer 0"),
            (serde_json::json!([null, []]), "layer 0"),
        ] {
            let error = read(value).unwrap_err();
            assert!(
                error.contains("expert_map") && error.contains(said),
                "{error}"
            );
        }
    }
}
