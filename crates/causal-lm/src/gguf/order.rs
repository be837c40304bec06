//! Orders of rows in which files differ from checkpoints.

/// An order of the rows of a matrix. Its places are computed one by one, so that an order takes no memory however many heads a
/// file claims to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Order {
    /// Rotated channels are neighbours in the file, where the checkpoint has them in the two halves of a head.
    Neighbours {
        /// Rows of the matrix: whole heads.
        rows: usize,
        /// Rows of a head, an even number.
        head_dim: usize,
    },
    /// The file has part below part, where the checkpoint has a head of each part in turn.
    PartAfterPart {
        /// Heads of each part.
        heads: usize,
        /// Parts: of queries, keys and values three.
        parts: usize,
        /// Rows of a head.
        head_dim: usize,
    },
}

impl Order {
    /// Rows of the matrix.
    pub fn rows(self) -> usize {
        match self {
            Self::Neighbours { rows, .. } => rows,
            Self::PartAfterPart {
                heads,
                parts,
                head_dim,
            } => heads * parts * head_dim,
        }
    }

    /// The row of the checkpoint that is row `row` of the file.
    pub fn in_checkpoint(self, row: usize) -> usize {
        match self {
            Self::Neighbours { head_dim, .. } => {
                let (head, within) = (row / head_dim, row % head_dim);
                head * head_dim + within / 2 + within % 2 * (head_dim / 2)
            }
            Self::PartAfterPart {
                heads,
                parts,
                head_dim,
            } => {
                let (head, within) = (row / head_dim, row % head_dim);
                let (part, head) = (head / heads, head % heads);
                (head * parts + part) * head_dim + within
            }
        }
    }

    /// The row of the file that is row `row` of the checkpoint.
    pub fn in_file(self, row: usize) -> usize {
        match self {
            Self::Neighbours { head_dim, .. } => {
                let half = head_dim / 2;
                let (head, within) = (row / head_dim, row % head_dim);
                head * head_dim + 2 * (within % half) + within / half
            }
            Self::PartAfterPart {
                heads,
                parts,
                head_dim,
            } => {
                let (head, within) = (row / head_dim, row % head_dim);
                let (head, part) = (head / parts, head % parts);
                (part * heads + head) * head_dim + within
            }
        }
    }

    /// For each row of the file that of the checkpoint.
    pub fn all_in_checkpoint(self) -> Vec<usize> {
        (0..self.rows())
            .map(|row| self.in_checkpoint(row))
            .collect()
    }

    /// For each row of the checkpoint that of the file.
    pub fn all_in_file(self) -> Vec<usize> {
        (0..self.rows()).map(|row| self.in_file(row)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_directions_undo_each_other() {
        let neighbours = |rows, head_dim| Order::Neighbours { rows, head_dim };
        let parts = |heads, parts, head_dim| Order::PartAfterPart {
            heads,
            parts,
            head_dim,
        };
        assert_eq!(neighbours(6, 6).all_in_checkpoint(), [0, 3, 1, 4, 2, 5]);
        assert_eq!(
            parts(2, 3, 2).all_in_checkpoint(),
            [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
        );
        for order in [
            neighbours(12, 6),
            neighbours(64, 16),
            neighbours(4, 2),
            neighbours(0, 8),
            parts(5, 3, 4),
            parts(1, 3, 8),
            parts(0, 3, 8),
        ] {
            let (there, back) = (order.all_in_checkpoint(), order.all_in_file());
            assert_eq!(there.len(), order.rows());
            assert!((0..there.len()).all(|row| back[there[row]] == row && there[back[row]] == row));
        }
    }
}
