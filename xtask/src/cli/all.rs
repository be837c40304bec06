//! The flags of `eval` without a suite.

use std::path::PathBuf;

use clap::Args;

use lm_eval::ProtocolKind;
use toy_lm::bundled::{CALIBRATION, EVALUATION};

use super::{DECODED, bundled, models, protocol, with_bos};
use crate::all::{Config, Inputs};
use crate::suites::perplexity;

const MODEL: &str = "Without a suite: run all of them on this checkpoint folder in Hugging Face layout, instead of the bundled model";

#[derive(Args)]
pub(super) struct AllArgs {
    #[arg(long, value_name = "DIR", help = models(MODEL))]
    model: Option<PathBuf>,
    /// Without a suite: text to evaluate --model on [default: that of the bundled model]
    #[arg(long, value_name = "FILE", requires = "model")]
    text: Option<PathBuf>,
    /// Without a suite: text to calibrate on; must differ from --text [default: that of the bundled model]
    #[arg(long, value_name = "FILE", requires = "model")]
    calib: Option<PathBuf>,
    /// Without a suite: how texts become windows and targets, as for a suite
    #[arg(long, requires = "model", value_name = "NAME", default_value = "windows", value_parser = protocol(DECODED))]
    protocol: ProtocolKind,
    /// Without a suite: do not begin windows with the tokenizer's BOS token
    #[arg(long, requires = "model", conflicts_with = "protocol")]
    no_bos: bool,
}

impl AllArgs {
    /// Whether anything was given that only a run of all suites takes.
    pub(super) fn is_given(&self) -> bool {
        self.model.is_some()
    }
}

impl From<AllArgs> for Config {
    fn from(args: AllArgs) -> Self {
        Config {
            inputs: args.model.map(|model| Inputs {
                text: perplexity::Config {
                    model,
                    text: args.text.unwrap_or_else(|| bundled(EVALUATION)),
                    protocol: with_bos(args.protocol, !args.no_bos),
                },
                calib: args.calib.unwrap_or_else(|| bundled(CALIBRATION)),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::all::presets;
    use crate::cli::{Cli, Command};
    use crate::eval::Scope;
    use crate::settings::Settings;

    #[test]
    fn the_command_line_of_every_preset_asks_for_the_preset() {
        for (protocol, window) in [
            (ProtocolKind::Windows, None),
            (ProtocolKind::WindowsWithoutBos, Some(64)),
            (ProtocolKind::Gptq, None),
        ] {
            let inputs = Inputs {
                text: perplexity::Config {
                    model: "a model".into(),
                    text: "text".into(),
                    protocol,
                },
                calib: "calib".into(),
            };
            let settings = Settings {
                window,
                samples: Some(16),
                seed: 3,
                ..Settings::default()
            };
            let presets = presets::all(&inputs, &settings).unwrap();
            assert!(!presets.is_empty());
            for preset in presets {
                let command = preset.command();
                // The name of the program is one word for the parser.
                let parsed = Cli::try_parse_from(&command[1..]).unwrap();
                let Command::Eval(args) = parsed.command else {
                    panic!("{command:?} is not an evaluation")
                };
                let run = args.run(Vec::new());
                let Scope::One(suite) = run.scope else {
                    panic!("{command:?} is not a suite")
                };
                assert_eq!(format!("{suite:?}"), format!("{:?}", preset.suite));
                assert_eq!(run.settings.seed, settings.seed);
                // Suites that read no text take neither.
                if !matches!(*suite, crate::suite::Suite::Lattice(_)) {
                    assert_eq!(run.settings.window, settings.window);
                    assert_eq!(run.settings.samples, settings.samples);
                }
            }
        }
    }
}
