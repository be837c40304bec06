//! Training of small decoders from nothing: what `train-default` and the recall task need, and no more.
//!
//! Candle differentiates and holds the tensors; [`ops`] and [`attention`] replace what it does slowly on a CPU.

mod attention;
mod ops;
mod student;

use std::f64::consts::PI;

use anyhow::Result;
use candle_core::Tensor;
use candle_core::backprop::GradStore;
use candle_nn::optim::{AdamW, Optimizer, ParamsAdamW};

pub(crate) use student::Student;

/// The learning rate over a run: a rise, then a cosine down to a twentieth.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Schedule {
    /// Steps in all.
    pub(crate) steps: usize,
    /// Steps over which the rate rises.
    pub(crate) warmup: usize,
    /// Largest rate.
    pub(crate) rate: f64,
}

impl Schedule {
    fn at(&self, step: usize) -> f64 {
        let rise = ((step + 1) as f64 / self.warmup as f64).min(1.0);
        let fall = 0.5 * (1.0 + (PI * step as f64 / self.steps as f64).cos());
        self.rate * rise * (0.05 + 0.95 * fall)
    }
}

/// AdamW on a student's tensors by a schedule, with the norm of each step's gradient limited to 1.
pub(crate) struct Trainer<'a> {
    student: &'a Student,
    optimizer: AdamW,
    schedule: Schedule,
    step: usize,
}

impl<'a> Trainer<'a> {
    pub(crate) fn new(student: &'a Student, schedule: Schedule) -> Result<Self> {
        let parameters = ParamsAdamW {
            beta2: 0.98,
            weight_decay: 0.01,
            ..ParamsAdamW::default()
        };
        let optimizer = AdamW::new(student.vars().values().cloned().collect(), parameters)?;
        Ok(Self {
            student,
            optimizer,
            schedule,
            step: 0,
        })
    }

    /// One step down the gradient of `loss`; returns its value.
    pub(crate) fn step(&mut self, loss: &Tensor) -> Result<f64> {
        let mut gradients = loss.backward()?;
        self.clip(&mut gradients)?;
        self.optimizer
            .set_learning_rate(self.schedule.at(self.step));
        self.optimizer.step(&gradients)?;
        self.step += 1;
        Ok(f64::from(loss.to_scalar::<f32>()?))
    }

    fn clip(&self, gradients: &mut GradStore) -> Result<()> {
        let mut square = 0.0;
        for var in self.student.vars().values() {
            if let Some(gradient) = gradients.get(var) {
                square += f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?);
            }
        }
        let norm = square.sqrt();
        if norm > 1.0 {
            for var in self.student.vars().values() {
                if let Some(gradient) = gradients.remove(var) {
                    gradients.insert(var, (gradient / norm)?);
                }
            }
        }
        Ok(())
    }
}
