//! Names of compressors: `sparsegpt-2:4`, `gptq-int4-g128-sym-act`, `wanda-2:4+rtn-int4`.

use std::fmt::{self, Display, Formatter};
use std::str::FromStr;

use super::grid::{Bits, Grid, Group, Range, ScaleDtype, Symmetry};
use super::prune::{Cut, Pattern, Prune, Score};
use super::sweep::{ColumnOrder, GroupFit, Sweep};
use super::{BlockQuantise, BlockRounding, BlockTypes, Compressor, Quantise, Rounding};
use crate::Error;

/// What names there are, for errors.
pub(crate) const GRAMMAR: &str = "\
expected `none`, PRUNING, QUANTISATION, BLOCKS, PRUNING+QUANTISATION or PRUNING+BLOCKS; \
PRUNING is magnitude, wanda or sparsegpt with -PERCENT or -N:M (N of M stay), for instance sparsegpt-2:4; \
QUANTISATION is rtn or gptq with -int2, -int3, -int4 or -int8, for instance gptq-int4-g128-sym-act; suffixes of both \
are -gN (columns per group; without: per output), -sym, -symclip, -signed, -offset, -mse and -exact (scales not rounded to f16), \
of gptq -act, -static and -stale, of magnitude and sparsegpt with a percentage -ties, \
of sparsegpt and gptq -dampX and -blockN; \
BLOCKS are GGUF block types (q4_0, q4_1, q5_0, q5_1, q8_0, q2_k to q6_k, iq4_nl) or mixes of them (q4_k_m, q3_k_l, ...), \
rounded as llama.cpp does (with -imatrix: weighted by the inputs) or, with gptq- before them, by GPTQ (suffixes -act, \
-plain for scales fitted without weighting, -dampX, -blockN), for instance q4_k_m-imatrix or gptq-q4_k_m";

impl Compressor {
    /// The words that names are made of, those with numbers of one's own left out; for hints where a name is wrong.
    pub const WORDS: &'static [&'static str] = &[
        "none",
        "magnitude",
        "wanda",
        "sparsegpt",
        "rtn",
        "gptq",
        "int2",
        "int3",
        "int4",
        "int8",
        "sym",
        "symclip",
        "signed",
        "offset",
        "mse",
        "exact",
        "act",
        "static",
        "stale",
        "ties",
        "imatrix",
        "plain",
        "q4_0",
        "q4_1",
        "q5_0",
        "q5_1",
        "q8_0",
        "q2_k",
        "q3_k",
        "q4_k",
        "q5_k",
        "q6_k",
        "iq4_nl",
        "q2_k_m",
        "q3_k_m",
        "q3_k_s",
        "q3_k_l",
        "q4_k_m",
        "q4_k_s",
        "q5_k_m",
        "q5_k_s",
    ];

    /// Leaves the weight as it is.
    pub const NONE: Self = Self {
        prune: None,
        quantise: None,
        blocks: None,
        sweep: Sweep {
            damping: Sweep::DAMPING,
            block: Sweep::BLOCK,
        },
    };
}

impl FromStr for Compressor {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        let refuse = |reason: String| Error::CompressorName {
            name: name.to_string(),
            reason,
        };
        if name == "none" {
            return Ok(Self::NONE);
        }
        let mut compressor = Self::NONE;
        for part in name.split('+') {
            let mut words = part.split('-');
            let method = words.next().unwrap_or_default();
            let given: Vec<&str> = words.collect();
            match method {
                "magnitude" | "wanda" | "sparsegpt" => {
                    if compressor.prune.is_some() || compressor.quantises() {
                        return Err(refuse("pruning comes once, and first".to_string()));
                    }
                    let score = match method {
                        "magnitude" => Score::Magnitude,
                        "wanda" => Score::Wanda,
                        _ => Score::SparseGpt,
                    };
                    compressor.pruning(score, &given)
                }
                "rtn" | "gptq" => {
                    if compressor.quantises() {
                        return Err(refuse("quantisation comes once".to_string()));
                    }
                    match given.split_first() {
                        Some((types, suffixes))
                            if method == "gptq" && !types.starts_with("int") =>
                        {
                            compressor.in_blocks(types, true, suffixes)
                        }
                        _ => compressor.quantisation(method == "gptq", &given),
                    }
                }
                types if types.parse::<BlockTypes>().is_ok() => {
                    if compressor.quantises() {
                        return Err(refuse("quantisation comes once".to_string()));
                    }
                    compressor.in_blocks(types, false, &given)
                }
                _ => Err(format!("no method is called `{method}`")),
            }
            .map_err(refuse)?;
        }
        // What does not depend on the number of columns can be said now.
        compressor.validate(None).map_err(|error| match error {
            Error::Compressor { reason, .. } => refuse(reason),
            other => other,
        })?;
        Ok(compressor)
    }
}

impl Compressor {
    fn pruning(&mut self, score: Score, words: &[&str]) -> Result<(), String> {
        let Some((&amount, suffixes)) = words.split_first() else {
            return Err("it lacks the share to prune".to_string());
        };
        let bad = || format!("`{amount}` is neither a percentage nor N:M");
        let mut pattern = match amount.split_once(':') {
            Some((keep, of)) => Pattern::Nm {
                keep: keep.parse().map_err(|_| bad())?,
                of: of.parse().map_err(|_| bad())?,
            },
            None => Pattern::Unstructured {
                percent: amount.parse().map_err(|_| bad())?,
                cut: Cut::Count,
            },
        };
        for &suffix in suffixes {
            match (&mut pattern, suffix) {
                (Pattern::Unstructured { cut, .. }, "ties") if score != Score::Wanda => {
                    *cut = Cut::Threshold;
                }
                _ if score == Score::SparseGpt && self.sweep(suffix)? => {}
                _ => return Err(format!("suffix `{suffix}` does not go with it")),
            }
        }
        self.prune = Some(Prune { score, pattern });
        Ok(())
    }

    fn quantisation(&mut self, gptq: bool, words: &[&str]) -> Result<(), String> {
        let Some((&bits, suffixes)) = words.split_first() else {
            return Err("it lacks the bits".to_string());
        };
        let bits = bits
            .strip_prefix("int")
            .and_then(|bits| Bits::new(bits.parse().ok()?))
            .ok_or_else(|| format!("`{bits}` is not int2, int3, int4 or int8"))?;
        let mut grid = Grid::new(bits);
        let (mut order, mut fit) = (ColumnOrder::Natural, GroupFit::Updated);
        for &suffix in suffixes {
            match suffix {
                "sym" => grid.symmetry = Symmetry::Symmetric,
                "symclip" => grid.symmetry = Symmetry::SymmetricClipped,
                "signed" => grid.symmetry = Symmetry::Signed,
                "offset" => grid.symmetry = Symmetry::Offset,
                "mse" => grid.range = Range::Mse,
                "exact" => grid.scales = ScaleDtype::Exact,
                "act" if gptq => order = ColumnOrder::Activation,
                "static" if gptq => fit = GroupFit::Static,
                "stale" if gptq => fit = GroupFit::Stale,
                _ => match suffix.strip_prefix('g').map(str::parse) {
                    Some(Ok(width)) => grid.group = Group::Columns(width),
                    _ if gptq && self.sweep(suffix)? => {}
                    _ => return Err(format!("suffix `{suffix}` does not go with it")),
                },
            }
        }
        let rounding = match gptq {
            true => Rounding::Gptq { order, fit },
            false => Rounding::Nearest,
        };
        self.quantise = Some(Quantise { grid, rounding });
        Ok(())
    }

    fn in_blocks(&mut self, types: &str, gptq: bool, suffixes: &[&str]) -> Result<(), String> {
        let types: BlockTypes = types.parse()?;
        let (mut importance, mut order) = (gptq, ColumnOrder::Natural);
        for &suffix in suffixes {
            match suffix {
                "imatrix" if !gptq => importance = true,
                "plain" if gptq => importance = false,
                "act" if gptq => order = ColumnOrder::Activation,
                _ if gptq && self.sweep(suffix)? => {}
                _ => return Err(format!("suffix `{suffix}` does not go with it")),
            }
        }
        let rounding = match gptq {
            true => BlockRounding::Gptq { importance, order },
            false => BlockRounding::Nearest { importance },
        };
        self.blocks = Some(BlockQuantise { types, rounding });
        Ok(())
    }

    /// Takes a suffix that concerns the sweep; false if it does not.
    fn sweep(&mut self, suffix: &str) -> Result<bool, String> {
        let bad = || format!("`{suffix}` has no number that can be read");
        if let Some(damping) = suffix.strip_prefix("damp") {
            self.sweep.damping = damping.parse().map_err(|_| bad())?;
        } else if let Some(block) = suffix.strip_prefix("block") {
            self.sweep.block = block.parse().map_err(|_| bad())?;
        } else {
            return Ok(false);
        }
        Ok(true)
    }
}

impl Display for Compressor {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if let Some(Prune { score, pattern }) = self.prune {
            f.write_str(match score {
                Score::Magnitude => "magnitude",
                Score::Wanda => "wanda",
                Score::SparseGpt => "sparsegpt",
            })?;
            match pattern {
                Pattern::Nm { keep, of } => write!(f, "-{keep}:{of}")?,
                Pattern::Unstructured { percent, cut } => {
                    write!(f, "-{percent}")?;
                    if cut == Cut::Threshold {
                        f.write_str("-ties")?;
                    }
                }
            }
        }
        match (self.prune, self.quantises()) {
            (None, false) => return f.write_str("none"),
            (Some(_), true) => {
                // One sweep at most: where there are two they share its parameters, shown once.
                if self.sweeps() && !self.is_gptq() {
                    self.sweep.fmt(f)?;
                }
                f.write_str("+")?;
            }
            _ => {}
        }
        if let Some(Quantise { grid, rounding }) = self.quantise {
            let method = match rounding {
                Rounding::Nearest => "rtn",
                Rounding::Gptq { .. } => "gptq",
            };
            write!(f, "{method}-int{}", grid.bits.get())?;
            if let Group::Columns(width) = grid.group {
                write!(f, "-g{width}")?;
            }
            f.write_str(match grid.symmetry {
                Symmetry::Asymmetric => "",
                Symmetry::Symmetric => "-sym",
                Symmetry::SymmetricClipped => "-symclip",
                Symmetry::Signed => "-signed",
                Symmetry::Offset => "-offset",
            })?;
            if grid.range == Range::Mse {
                f.write_str("-mse")?;
            }
            if grid.scales == ScaleDtype::Exact {
                f.write_str("-exact")?;
            }
            if let Rounding::Gptq { order, fit } = rounding {
                if order == ColumnOrder::Activation {
                    f.write_str("-act")?;
                }
                f.write_str(match fit {
                    GroupFit::Updated => "",
                    GroupFit::Stale => "-stale",
                    GroupFit::Static => "-static",
                })?;
            }
        }
        if let Some(BlockQuantise { types, rounding }) = self.blocks {
            match rounding {
                BlockRounding::Nearest { importance } => {
                    write!(f, "{types}{}", if importance { "-imatrix" } else { "" })?;
                }
                BlockRounding::Gptq { importance, order } => {
                    write!(f, "gptq-{types}{}", if importance { "" } else { "-plain" })?;
                    if order == ColumnOrder::Activation {
                        f.write_str("-act")?;
                    }
                }
            }
        }
        if self.is_gptq() || (self.sweeps() && !self.quantises()) {
            self.sweep.fmt(f)?;
        }
        Ok(())
    }
}

impl Display for Sweep {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let usual = Self::default();
        if self.damping != usual.damping {
            write!(f, "-damp{}", self.damping)?;
        }
        if self.block != usual.block {
            write!(f, "-block{}", self.block)?;
        }
        Ok(())
    }
}

impl TryFrom<String> for Compressor {
    type Error = Error;

    fn try_from(name: String) -> Result<Self, Error> {
        name.parse()
    }
}

impl From<Compressor> for String {
    fn from(compressor: Compressor) -> Self {
        compressor.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_as_they_went_in() {
        let long = [
            "none",
            "magnitude-62.5-ties",
            "wanda-4:8",
            "sparsegpt-50-ties-damp0.1-block64",
            "rtn-int2-g16-symclip-mse-exact",
            "gptq-int8-g32-sym-mse-exact-act-static-damp0.05-block32",
            "gptq-int3-g64-act-stale",
            "gptq-int4-g32-offset",
            "q8_0",
            "q2_k-imatrix",
            "gptq-q3_k_m-plain-act-damp0.1",
            "sparsegpt-2:4+gptq-q4_0",
            "wanda-2:4+q6_k-imatrix",
            "rtn-int4-g32-signed",
            "sparsegpt-50-damp0.1+rtn-int4-g32",
            "sparsegpt-2:4+gptq-int4-damp0.1",
            "wanda-2:4+gptq-int4-act",
        ];
        for name in Compressor::COMMON.iter().chain(&long) {
            let compressor: Compressor = name.parse().expect("a name");
            assert_eq!(compressor.to_string(), *name);
            let json = serde_json::to_string(&compressor).expect("JSON");
            assert_eq!(json, format!("\"{name}\""));
            let back: Compressor = serde_json::from_str(&json).expect("the same");
            assert_eq!(back, compressor);
        }
    }

    #[test]
    fn every_word_is_part_of_a_name() {
        for word in Compressor::WORDS {
            let names = [
                word.to_string(),
                format!("{word}-50"),
                format!("{word}-int4"),
                format!("rtn-{word}"),
                format!("rtn-int4-{word}"),
                format!("gptq-int4-{word}"),
                format!("magnitude-50-{word}"),
                format!("q4_k-{word}"),
                format!("gptq-q4_k-{word}"),
            ];
            assert!(
                names.iter().any(|name| name.parse::<Compressor>().is_ok()),
                "{word}"
            );
        }
    }

    #[test]
    fn a_bad_name_says_what_is_wrong_and_what_there_is() {
        for (name, wrong) in [
            ("", "no method is called ``"),
            ("prune-50", "`prune`"),
            ("wanda", "lacks the share"),
            ("wanda-half", "`half` is neither"),
            ("wanda-100", "outside [0, 100)"),
            ("wanda-nan", "outside [0, 100)"),
            ("wanda-4:4", "4:4 needs 0 < N < M"),
            ("wanda-50-ties", "`ties`"),
            ("magnitude-50-damp0.1", "`damp0.1`"),
            ("rtn-int5", "`int5` is not int2"),
            ("rtn-int4-act", "`act`"),
            ("rtn-int4-g0", "1 to 1048576 columns"),
            ("rtn-int4-g18446744073709551615", "1 to 1048576 columns"),
            (
                "gptq-int4-block18446744073709551615",
                "1 to 1048576 columns",
            ),
            ("q4_k-act", "`act`"),
            ("gptq-q4_k-imatrix", "`imatrix`"),
            ("gptq-f16", "`f16`"),
            ("wanda-2:4+q4_k", "does not keep zeros"),
            ("rtn-int4+q4_k", "quantisation comes once"),
            ("wanda-2:4+rtn-int4-g32-offset", "does not keep zeros"),
            ("gptq-int4-dampx", "`dampx` has no number"),
            ("gptq-int4-damp-1", "`damp` has no number"),
            ("rtn-int4+wanda-50", "pruning comes once, and first"),
            ("rtn-int4+rtn-int4", "quantisation comes once"),
            ("sparsegpt-2:4+gptq-int4-act", "act-order takes apart"),
            ("sparsegpt-2:4+gptq-int4-g6", "groups of 6"),
        ] {
            let error = name.parse::<Compressor>().expect_err(name).to_string();
            assert!(error.contains(wrong), "{name}: {error}");
            assert!(error.contains("sparsegpt-2:4"), "{error}");
        }
    }
}
