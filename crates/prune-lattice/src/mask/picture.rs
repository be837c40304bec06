//! A picture of a mask: one square for each gate, a mark for each block (or entry) that is kept.

use super::Block;
use crate::order::bits::BitMatrix;
use std::fmt::Write as _;

/// Marks of a gate that a picture can show.
const MOST: usize = 20_000;
/// Width of a gate in pixels.
const SIZE: f64 = 220.0;
const GAP: f64 = 16.0;

/// The mask `keep` `[gates * rows, cols]` as SVG, a panel for each gate, `names` above them; the darker a block, the more of its
/// entries are kept. `None` where there are more blocks than a picture can show, or the gates do not fit.
pub fn mask_svg(keep: &BitMatrix, names: &[&str], block: Block) -> Option<String> {
    let gates = names.len();
    if gates == 0 || keep.rows() == 0 || keep.cols() == 0 || !keep.rows().is_multiple_of(gates) {
        return None;
    }
    let rows = keep.rows() / gates;
    let (down, across) = block.grid(rows, keep.cols());
    if down * across > MOST {
        return None;
    }
    let height = SIZE * rows as f64 / keep.cols() as f64;
    let (width, total) = (gates as f64 * (SIZE + GAP), height + 24.0);
    let mut svg = format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0} {total:.0}" width="{width:.0}" height="{total:.0}" font-family="sans-serif" font-size="12">"#
    );
    for (g, name) in names.iter().enumerate() {
        let left = g as f64 * (SIZE + GAP);
        let _ = write!(svg, r#"<text x="{left:.1}" y="14">{name}</text>"#);
        let _ = write!(
            svg,
            r##"<rect x="{left:.1}" y="20" width="{SIZE:.1}" height="{height:.1}" fill="none" stroke="#999"/>"##
        );
        let (w, h) = (
            SIZE * block.cols as f64 / keep.cols() as f64,
            SIZE * block.rows as f64 / keep.cols() as f64,
        );
        for a in 0..down {
            for b in 0..across {
                let of_rows = a * block.rows..rows.min((a + 1) * block.rows);
                let columns = b * block.cols..keep.cols().min((b + 1) * block.cols);
                let size = of_rows.len() * columns.len();
                let entries = of_rows.flat_map(|i| columns.clone().map(move |j| (i, j)));
                let kept = entries.filter(|&(i, j)| keep.get(g * rows + i, j)).count();
                if kept == 0 {
                    continue;
                }
                let (x, y) = (left + b as f64 * w, 20.0 + a as f64 * h);
                let (w, h) = (w.min(left + SIZE - x), h.min(20.0 + height - y));
                let opacity = kept as f64 / size as f64;
                let _ = write!(
                    svg,
                    r##"<rect x="{x:.2}" y="{y:.2}" width="{w:.2}" height="{h:.2}" fill="#1f6f8b" fill-opacity="{opacity:.2}"/>"##
                );
            }
        }
    }
    svg.push_str("</svg>");
    Some(svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_has_a_mark_for_each_block_that_is_kept_and_a_frame_for_each_gate() {
        let block = Block { rows: 2, cols: 2 };
        // Gate 0: blocks (0, 0) whole and (1, 2) cut off at the border; gate 1: one entry.
        let keep = BitMatrix::from_fn(6, 5, |i, j| {
            (i < 2 && j < 2) || (i, j) == (2, 4) || (i, j) == (3, 3)
        });
        let svg = mask_svg(&keep, &["i", "f"], block).unwrap();
        assert_eq!(svg.matches("fill=\"none\"").count(), 2);
        assert_eq!(svg.matches("fill-opacity=\"1.00\"").count(), 2);
        assert_eq!(svg.matches("fill-opacity=\"0.25\"").count(), 1);
        assert!(svg.contains(">i<") && svg.contains(">f<"));
        assert!(mask_svg(&keep, &["a", "b", "c", "d"], block).is_none());
        let large = BitMatrix::ones(400, 400);
        assert!(mask_svg(&large, &["a"], Block { rows: 1, cols: 1 }).is_none());
    }
}
