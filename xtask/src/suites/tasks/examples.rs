//! Examples with answers that stand before a question.

use std::path::PathBuf;

use anyhow::{Result, ensure};

use super::layout::{Data, Item};

/// Where examples come from and how many stand before each question.
#[derive(Debug, Clone, Default)]
pub struct Shots {
    /// Examples before each question.
    pub count: usize,
    /// File they are taken from, its first ones; otherwise the question's own file, its first ones but the question
    /// itself.
    pub from: Option<PathBuf>,
}

/// The examples for one file of questions.
pub(crate) struct Examples<'a> {
    count: usize,
    /// Items to take from, and whether these are the questions themselves.
    pool: &'a [Item],
    own: bool,
}

impl<'a> Examples<'a> {
    /// Examples for the questions of `data`, taken from `other` where there is one.
    ///
    /// # Errors
    /// Another layout, or too few items.
    pub(crate) fn new(shots: &Shots, data: &'a Data, other: Option<&'a Data>) -> Result<Self> {
        let from = other.unwrap_or(data);
        ensure!(
            from.layout == data.layout,
            "--shots-from: {} is of the layout {}, {} of {}",
            from.path.display(),
            from.layout.name(),
            data.path.display(),
            data.layout.name()
        );
        let own = other.is_none();
        let found = from.items.len() - usize::from(own);
        ensure!(
            shots.count <= found,
            "--shots {}: {} has {found} examples to give",
            shots.count,
            from.path.display()
        );
        Ok(Self {
            count: shots.count,
            pool: &from.items,
            own,
        })
    }

    /// What stands before question `index`: each example and an empty line.
    pub(crate) fn before(&self, index: usize) -> String {
        let others = self.pool.iter().enumerate();
        let others = others.filter(|(i, _)| !self.own || *i != index);
        others
            .take(self.count)
            .map(|(_, item)| item.example() + "\n\n")
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::layout::{Answer, Layout};
    use super::*;

    fn data(layout: Layout) -> Data {
        let item = |i: usize| Item {
            prompt: format!("Q{i}"),
            answer: Answer::Worked(format!("A{i}")),
        };
        Data {
            path: "x.jsonl".into(),
            layout,
            items: (0..3).map(item).collect(),
        }
    }

    #[test]
    fn a_question_is_not_its_own_example() {
        let (data, two) = (
            data(Layout::Gsm8k),
            Shots {
                count: 2,
                from: None,
            },
        );
        let own = Examples::new(&two, &data, None).unwrap();
        assert_eq!(own.before(0), "Q1 A1\n\nQ2 A2\n\n");
        assert_eq!(own.before(1), "Q0 A0\n\nQ2 A2\n\n");
        let other = Examples::new(&two, &data, Some(&data)).unwrap();
        assert_eq!(other.before(0), "Q0 A0\n\nQ1 A1\n\n");
        assert_eq!(
            Examples::new(&Shots::default(), &data, None)
                .unwrap()
                .before(0),
            ""
        );
    }

    #[test]
    fn too_few_examples_and_other_layouts_are_refused() {
        let (gsm8k, piqa) = (data(Layout::Gsm8k), data(Layout::Piqa));
        let shots = |count| Shots { count, from: None };
        let error = Examples::new(&shots(3), &gsm8k, None).err().unwrap();
        assert!(error.to_string().contains("--shots 3: x.jsonl has 2"));
        assert!(Examples::new(&shots(3), &gsm8k, Some(&gsm8k)).is_ok());
        assert!(Examples::new(&shots(1), &gsm8k, Some(&piqa)).is_err());
    }
}
