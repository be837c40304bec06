//! Examples with answers in front of a question.

use super::layout::{Item, Task};
use crate::{Error, Result};

/// The examples of few-shot prompts for the questions of one task.
#[derive(Clone, Debug)]
pub struct Examples<'a> {
    count: usize,
    /// Items to take from, and whether these are the questions themselves.
    pool: &'a [Item],
    own: bool,
}

impl<'a> Examples<'a> {
    /// No examples: zero-shot prompts.
    pub fn none() -> Self {
        Self {
            count: 0,
            pool: &[],
            own: false,
        }
    }

    /// The first `count` other questions of the task itself.
    ///
    /// # Errors
    /// [`Error::Examples`] where there are fewer.
    pub fn of_task(count: usize, task: &'a Task) -> Result<Self> {
        Self::new(count, task, task, true)
    }

    /// The first `count` questions of another file for those of `task`.
    ///
    /// # Errors
    /// [`Error::Examples`] for another layout, or where there are fewer.
    pub fn of_file(count: usize, task: &Task, from: &'a Task) -> Result<Self> {
        Self::new(count, task, from, false)
    }

    fn new(count: usize, task: &Task, from: &'a Task, own: bool) -> Result<Self> {
        let refuse = |reason: String| Error::Examples {
            path: from.path.clone(),
            reason,
        };
        if from.layout != task.layout {
            return Err(refuse(format!(
                "the examples are of the layout {}, the questions in {} of {}",
                from.layout.name(),
                task.path.display(),
                task.layout.name()
            )));
        }
        let found = from.items.len() - usize::from(own);
        if count > found {
            return Err(refuse(format!(
                "{count} examples are wanted, there are {found}"
            )));
        }
        Ok(Self {
            count,
            pool: &from.items,
            own,
        })
    }

    /// The text before question `index`: each example and an empty line.
    pub fn before(&self, index: usize) -> String {
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

    fn task(layout: Layout) -> Task {
        let item = |i: usize| Item {
            prompt: format!("Q{i}"),
            answer: Answer::Worked(format!("A{i}")),
        };
        Task {
            path: "x.jsonl".into(),
            layout,
            items: (0..3).map(item).collect(),
        }
    }

    #[test]
    fn a_question_is_not_its_own_example() {
        let task = task(Layout::Gsm8k);
        let own = Examples::of_task(2, &task).unwrap();
        assert_eq!(own.before(0), "Q1 A1\n\nQ2 A2\n\n");
        assert_eq!(own.before(1), "Q0 A0\n\nQ2 A2\n\n");
        let other = Examples::of_file(2, &task, &task).unwrap();
        assert_eq!(other.before(0), "Q0 A0\n\nQ1 A1\n\n");
        assert_eq!(Examples::none().before(0), "");
    }

    #[test]
    fn too_few_examples_and_other_layouts_are_refused() {
        let (gsm8k, piqa) = (task(Layout::Gsm8k), task(Layout::Piqa));
        let error = Examples::of_task(3, &gsm8k).err().unwrap().to_string();
        assert!(
            error.contains("x.jsonl: 3 examples are wanted, there are 2"),
            "{error}"
        );
        assert!(Examples::of_file(3, &gsm8k, &gsm8k).is_ok());
        assert!(Examples::of_file(1, &gsm8k, &piqa).is_err());
    }
}
