//! K = Σ w x x̂ᵀ of teacher inputs x and student inputs x̂ of the same tokens.

use super::Rows;
use super::gram::BLOCK_TOKENS;
use crate::{Error, Result};
use faer::{Mat, MatRef};
use linalg::{Entries, add_product_f32};

/// Collects K: f32 products over blocks of tokens, f64 sums, blocks filled across calls.
#[derive(Clone, Debug)]
pub(crate) struct CrossCollector {
    sum: Mat<f64>,
    teacher: Vec<f32>,
    student: Vec<f32>,
}

impl CrossCollector {
    /// An empty sum over tokens of `width` channels.
    pub(crate) fn new(width: usize) -> Self {
        Self::resume(Mat::zeros(width, width))
    }

    /// Goes on from a finished sum.
    pub(crate) fn resume(sum: Mat<f64>) -> Self {
        Self {
            sum,
            teacher: Vec::new(),
            student: Vec::new(),
        }
    }

    /// Adds a batch; the weights are those of the student's tokens.
    ///
    /// # Errors
    /// When the two do not have as many tokens, or a width is another one.
    pub(crate) fn update(&mut self, teacher: &Rows, student: &Rows) -> Result<()> {
        let width = self.sum.nrows();
        teacher.expect_width(width)?;
        student.expect_width(width)?;
        if teacher.tokens() != student.tokens() {
            return Err(Error::Shape {
                what: "teacher activations",
                found: vec![teacher.tokens(), width],
                expected: vec![student.tokens(), width],
            });
        }
        let mut start = 0;
        while start < student.tokens() {
            let room = BLOCK_TOKENS - self.student.len() / width;
            let end = student.tokens().min(start + room);
            student.scaled_into(start..end, &mut self.student);
            for token in start..end {
                let scale = student.weight(token).sqrt();
                let row = teacher.row(token).iter();
                self.teacher
                    .extend(row.map(|&x| (f64::from(x) * scale) as f32));
            }
            if end - start == room {
                self.flush();
            }
            start = end;
        }
        Ok(())
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> u64 {
        let n = self.sum.nrows();
        let single = self.teacher.capacity() + self.student.capacity();
        (size_of::<f64>() * n * n + size_of::<f32>() * single) as u64
    }

    fn flush(&mut self) {
        let width = self.sum.nrows();
        let tokens = self.student.len() / width.max(1);
        let teacher = MatRef::from_column_major_slice(&self.teacher, width, tokens);
        let student = MatRef::from_column_major_slice(&self.student, width, tokens);
        add_product_f32(self.sum.as_mut(), teacher, student, 1.0, Entries::All);
        self.teacher.clear();
        self.student.clear();
    }

    /// K, `n × n`.
    pub(crate) fn finish(mut self) -> Mat<f64> {
        self.flush();
        self.sum
    }
}
