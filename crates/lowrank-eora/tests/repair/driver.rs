//! The repair of a model block by block.

use crate::common::{
    assert_close, compressor, decoder, eora, from_tensor, held_out, id, run, timeless, tiny,
    tiny_with, to_tensor, trained, wide, wide_with, windows,
};
use candle_core::{DType, Device, Tensor};
use causal_lm::block::RopeTables;
use causal_lm::testing::TestModel;
use causal_lm::{Block, Decoder, Hidden, LinearName, Mixer, NoTap, Site, Tap, TapResult, Windows};
use faer::{Mat, Side};
use lowrank_eora::Error;
use lowrank_eora::compress::{Compressor, Inputs};
use lowrank_eora::output::{CheckpointOptions, Layout, Weights, gptq, write_checkpoint};
use lowrank_eora::repair::{
    CompressedModel, Energy, FactorStorage, InputSource, LayerId, Method, Repair, Repaired, Source,
    Texts, WithinBlock,
};
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use tensor_io::{Cancelled, Checkpoint, NoProgress, Progress, WriteOptions};

/// Inputs of the linears of a block, one token per row.
#[derive(Default)]
struct Inputs4(BTreeMap<usize, Vec<Tensor>>);

fn site_of(linear: LinearName) -> Site {
    match linear {
        LinearName::Q | LinearName::K | LinearName::V => Site::Qkv,
        LinearName::O => Site::O,
        LinearName::Gate | LinearName::Up => Site::GateUp,
        _ => Site::Down,
    }
}

impl Tap for Inputs4 {
    fn observe(&mut self, _block: usize, site: Site, x: &Tensor) -> TapResult {
        self.0.entry(site as usize).or_default().push(x.clone());
        Ok(())
    }
}

impl Inputs4 {
    fn of(block: &Block, states: &[Tensor], rope: &RopeTables) -> Self {
        let mut inputs = Self::default();
        for batch in states {
            block
                .forward(batch, rope, &mut Mixer::Windows, &mut inputs)
                .unwrap();
        }
        inputs
    }

    /// X, `n × t`.
    fn matrix(&self, linear: LinearName) -> Mat<f64> {
        let all = Tensor::cat(&self.0[&(site_of(linear) as usize)], 0).unwrap();
        from_tensor(&all).transpose().to_owned()
    }
}

/// A linear that is stored alone.
fn linear_of(id: LayerId) -> LinearName {
    id.module().parts[0]
}

fn weight_of(block: &Block, linear: LinearName) -> Tensor {
    block.linear(linear).unwrap().weight().unwrap()
}

/// EoRA by its definition: T = Q √Λ, [D T]_r T⁻¹.
fn by_definition(d: &Mat<f64>, x: &Mat<f64>, rank: usize) -> Mat<f64> {
    let h = x * x.transpose();
    let eigen = h.self_adjoint_eigen(Side::Lower).unwrap();
    let (q, values) = (eigen.U(), eigen.S().column_vector());
    let n = h.nrows();
    let t = Mat::from_fn(n, n, |i, j| q[(i, j)] * values[j].sqrt());
    let inverse = Mat::from_fn(n, n, |i, j| q[(j, i)] / values[i].sqrt());
    let svd = (d * &t).thin_svd().unwrap();
    let truncated = Mat::from_fn(d.nrows(), n, |i, j| {
        (0..rank)
            .map(|k| svd.U()[(i, k)] * svd.S().column_vector()[k] * svd.V()[(j, k)])
            .sum::<f64>()
    });
    truncated * inverse
}

/// W_c and B A of all linears: each block once to see its inputs, once to go on.
fn naive(
    decoder: &Decoder<'_>,
    compressor: Compressor,
    rank: usize,
    windows: &Windows,
    repair: &Repair,
) -> BTreeMap<LayerId, (Mat<f64>, Mat<f64>)> {
    let rope = decoder.rope(0, windows.window_len()).unwrap();
    let mut student = Hidden::embed(decoder, windows).unwrap();
    let mut teacher = student.clone();
    let mut all = BTreeMap::new();
    for layer in 0..decoder.config().layers() {
        let dense = decoder.block(layer).unwrap();
        let mut block = dense.clone();
        let mut seen = Inputs4::of(&dense, student.batches(), &rope);
        if repair.inputs == InputSource::Dense {
            seen = Inputs4::of(&dense, teacher.batches(), &rope);
        }
        for linear in LinearName::ALL {
            let starts = !matches!(linear, LinearName::K | LinearName::V | LinearName::Up);
            if repair.within_block == WithinBlock::Sequential && starts {
                seen = Inputs4::of(&block, student.batches(), &rope);
            }
            let x = seen.matrix(linear);
            let w = from_tensor(&weight_of(&block, linear));
            let h = &x * x.transpose();
            let compressed = compressor.compress(w.as_ref(), Some(Inputs::Gram(h.as_ref())));
            let compressed = compressed
                .unwrap()
                .to_tensor(DType::F32, &Device::Cpu)
                .unwrap();
            let w_c = from_tensor(&compressed);
            let ba = by_definition(&(&w - &w_c), &x, rank);
            let repaired = to_tensor((&w_c + &ba).as_ref());
            block.linear_mut(linear).unwrap().set_weight(repaired);
            all.insert(id(layer, linear), (w_c, ba));
        }
        student.advance(&block, &mut NoTap).unwrap();
        teacher.advance(&dense, &mut NoTap).unwrap();
    }
    all
}

#[test]
fn the_streaming_repair_equals_a_naive_two_pass_implementation() {
    let tiny = tiny();
    let decoder = tiny.decoder();
    let windows = windows(12, 1);
    let variants = [
        (InputSource::Repaired, WithinBlock::Original),
        (InputSource::Repaired, WithinBlock::Sequential),
        (InputSource::Dense, WithinBlock::Original),
    ];
    for (index, (inputs, within_block)) in variants.into_iter().enumerate() {
        let repair = eora(3).with_inputs(inputs).with_within_block(within_block);
        let folder = tiny.path(&format!("run-{index}"));
        let source = compressor("wanda-2:4");
        let repaired = run(&repair, &decoder, &source, &folder);
        let expected = naive(&decoder, source, 3, &windows, &repair);
        assert_eq!(expected.len(), repaired.reports().count());
        for block in 0..repaired.blocks() {
            for layer in repaired.block(block).unwrap() {
                let (w_c, ba) = &expected[&layer.report.layer];
                assert_close(layer.weight.matrix().unwrap().as_ref(), w_c.as_ref(), 1e-9);
                let found = layer.factors.unwrap().product();
                assert_close(found.as_ref(), ba.as_ref(), 2e-3);
            }
        }
    }
}

#[test]
fn reported_losses_are_those_of_the_stored_factors_on_the_tokens_themselves() {
    let tiny = tiny();
    let decoder = tiny.decoder();
    let repair = eora(4).with_factors(FactorStorage::F16);
    let repaired = run(
        &repair,
        &decoder,
        &compressor("rtn-int3"),
        &tiny.path("run"),
    );
    let held_out = windows(6, 2);
    let rope = decoder.rope(0, 16).unwrap();
    let states = Hidden::embed(&decoder, &held_out).unwrap();
    let dense = decoder.block(0).unwrap();
    let seen = Inputs4::of(&dense, states.batches(), &rope);
    for layer in repaired.block(0).unwrap() {
        let linear = linear_of(layer.report.layer);
        let x = seen.matrix(linear);
        let w = from_tensor(&weight_of(&dense, linear));
        let square = |e: &Mat<f64>| (e * &x).squared_norm_l2();
        let found = layer.report.held_out.unwrap();
        let expected = Energy {
            target: square(&w),
            before: square(&(&w - &layer.weight.matrix().unwrap())),
            after: square(&(&w - &layer.merged().unwrap())),
        };
        for (found, expected) in [
            (found.target, expected.target),
            (found.before, expected.before),
            (found.after, expected.after),
        ] {
            assert!((found / expected - 1.0).abs() < 1e-5, "{found} {expected}");
        }
        assert!(found.after < found.before);
    }
}

#[test]
fn an_importance_matrix_holds_the_mean_squares_of_the_calibration_tokens() {
    let tiny = tiny();
    let decoder = tiny.decoder();
    // One compressor needs H of its inputs, the other does without it where it can.
    for name in ["gptq-q4_0", "q4_0"] {
        let repaired = run(&eora(2), &decoder, &compressor(name), &tiny.path(name));
        let imatrix = lowrank_eora::output::imatrix(&repaired, &decoder, "a text").unwrap();
        assert_eq!(imatrix.entries.len(), 14);
        let rope = decoder.rope(0, 16).unwrap();
        let states = Hidden::embed(&decoder, &windows(12, 1)).unwrap();
        let seen = Inputs4::of(&decoder.block(0).unwrap(), states.batches(), &rope);
        for (gguf, linear) in [("attn_k", LinearName::K), ("ffn_down", LinearName::Down)] {
            let x = seen.matrix(linear);
            let entry = &imatrix.entries[&format!("blk.0.{gguf}.weight")];
            assert_eq!(entry.counts, [12 * 16]);
            for (j, mean) in entry.means.iter().enumerate() {
                let expected = x.row(j).squared_norm_l2() / x.ncols() as f64;
                assert!((mean / expected - 1.0).abs() < 1e-5, "{mean} {expected}");
            }
        }
        let path = tiny.path(&format!("{name}.imatrix"));
        imatrix.write_gguf(&path).unwrap();
        let read = tensor_io::imatrix::Imatrix::read(&path).unwrap();
        assert_eq!(read.entries.len(), 14);
    }
}

#[test]
fn an_importance_matrix_without_the_experts_of_a_mixture_is_refused() {
    let tiny = tiny();
    let repaired = run(
        &eora(2),
        &tiny.decoder(),
        &compressor("q4_0"),
        &tiny.path("run"),
    );
    let fields = serde_json::json!({"num_local_experts": 4, "num_experts_per_tok": 2});
    let mixture = TestModel::new(&causal_lm::testing::config("mixtral", fields));
    let error = lowrank_eora::output::imatrix(&repaired, &mixture.decoder(), "a text").unwrap_err();
    assert!(matches!(error, Error::Setting { .. }), "{error}");
    assert!(error.to_string().contains("mixtral"), "{error}");
}

#[test]
fn damping_that_had_to_grow_is_reported_and_written_into_the_file() {
    let tiny = tiny();
    let decoder = tiny.decoder();
    let asked = |name: &str, count| {
        let windows = windows(count, 1);
        let repaired = eora(2).run(
            &decoder,
            &compressor(name),
            Texts::new(&windows),
            tiny.path(name),
            &NoProgress,
        );
        repaired.unwrap()
    };
    // 16 tokens span no more than 16 of 32 or 64 channels.
    let few = asked("gptq-int4-g16-sym-damp0", 1);
    let damping = few.damping().unwrap();
    assert_eq!(damping.raised, 14);
    assert!(
        damping.largest > 0.0 && damping.largest < 1.0,
        "{damping:?}"
    );
    for report in few.reports() {
        let sweep = report.sweep.unwrap();
        assert!(sweep.retries > 0 && sweep.damping > 0.0 && sweep.damping <= damping.largest);
    }
    let layout = Layout::Gptq {
        version: gptq::Version::V1,
    };
    let dir = tiny.path("file");
    let options = CheckpointOptions::new(Weights::Compressed, layout);
    write_checkpoint(&decoder, &few, &dir, &options, &NoProgress).unwrap();
    let config = Checkpoint::open(&dir).unwrap();
    let section = config.config().section("quantization_config").unwrap();
    assert_eq!(section.f64("damp_percent").unwrap(), damping.largest);

    let enough = asked("gptq-int4-g16-sym-damp0.01", 40);
    let damping = enough.damping().unwrap();
    assert_eq!((damping.raised, damping.largest), (0, 0.01));
    // Another repair from the same weights still knows.
    let windows = windows(40, 1);
    let again = eora(3).run(
        &decoder,
        &few,
        Texts::new(&windows),
        tiny.path("again"),
        &NoProgress,
    );
    assert_eq!(again.unwrap().damping(), few.damping());
    assert_eq!(asked("rtn-int4", 1).damping(), None);
}

#[test]
fn a_run_that_was_killed_goes_on_to_the_same_result() {
    let tiny = tiny();
    let decoder = tiny.decoder();
    let source = compressor("gptq-int4");
    let (whole, killed) = (tiny.path("whole"), tiny.path("killed"));
    let whole = run(&eora(2), &decoder, &source, &whole);
    run(&eora(2), &decoder, &source, &killed);
    std::fs::remove_file(killed.join("block-00001.safetensors")).unwrap();
    assert!(matches!(
        Repaired::open(&killed),
        Err(Error::Malformed { .. })
    ));

    let (calibration, held_out) = (windows(12, 1), windows(6, 2));
    let texts = Texts::new(&calibration).with_held_out(&held_out);
    let messages = Messages::default();
    let again = eora(2)
        .run(&decoder, &source, texts, &killed, &messages)
        .unwrap();
    let messages = messages.0.into_inner().unwrap();
    assert_eq!(messages.len(), 2);
    assert!(messages[0].ends_with("from an earlier run"), "{messages:?}");
    assert!(messages[1].starts_with("block 1: loss 0."), "{messages:?}");
    let reports = |repaired: &Repaired| repaired.reports().map(timeless).collect::<Vec<_>>();
    assert_eq!(reports(&whole), reports(&again));
    for block in 0..2 {
        let pairs = whole
            .block(block)
            .unwrap()
            .into_iter()
            .zip(again.block(block).unwrap());
        for (a, b) in pairs {
            assert_eq!(a.merged().unwrap(), b.merged().unwrap());
        }
    }
}

/// Cancels after some linears of a run, and keeps the messages of finished blocks.
#[derive(Default)]
struct Messages(Mutex<Vec<String>>, Option<u64>, AtomicU64);

impl Progress for Messages {
    fn advance(&self, _steps: u64) -> Result<(), Cancelled> {
        match self.1 {
            Some(last) if self.2.fetch_add(1, Ordering::Relaxed) >= last => Err(Cancelled),
            _ => Ok(()),
        }
    }

    fn message(&self, text: &str) {
        self.0.lock().unwrap().push(text.into());
    }
}

#[test]
fn a_cancelled_run_keeps_the_blocks_that_are_finished() {
    let tiny = tiny();
    let decoder = tiny.decoder();
    let (calibration, folder) = (windows(12, 1), tiny.path("run"));
    // Seven linears and the block itself, and then two linears of the next block.
    let cancelling = Messages(Mutex::default(), Some(10), AtomicU64::new(0));
    let texts = Texts::new(&calibration);
    let source = compressor("rtn-int4");
    let error = eora(2)
        .run(&decoder, &source, texts, &folder, &cancelling)
        .unwrap_err();
    assert!(matches!(error, Error::Cancelled(_)), "{error}");
    assert!(folder.join("block-00000.safetensors").exists());
    assert!(!folder.join("block-00001.safetensors").exists());
}

#[test]
fn a_flipped_bit_in_the_state_of_a_block_is_an_error() {
    let tiny = tiny();
    let decoder = tiny.decoder();
    let folder = tiny.path("run");
    run(&eora(2), &decoder, &compressor("rtn-int4"), &folder);
    let path = folder.join("block-00001.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    for at in [3, bytes.len() / 4, bytes.len() / 2, bytes.len() - 1] {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0b10;
        std::fs::write(&path, damaged).unwrap();
        let opened = Repaired::open(&folder);
        assert!(matches!(opened, Err(Error::Checkpoint(_))), "byte {at}");
        let (calibration, held_out) = (windows(12, 1), windows(6, 2));
        let texts = Texts::new(&calibration).with_held_out(&held_out);
        let resumed = eora(2).run(
            &decoder,
            &compressor("rtn-int4"),
            texts,
            &folder,
            &NoProgress,
        );
        assert!(matches!(resumed, Err(Error::Checkpoint(_))), "byte {at}");
    }
    std::fs::write(&path, bytes).unwrap();
    Repaired::open(&folder).unwrap();
}

#[test]
fn a_model_that_was_edited_deep_inside_a_tensor_is_another_run() {
    let name = "model.layers.1.mlp.down_proj.weight";
    let tiny = wide();
    let decoder = tiny.decoder();
    let folder = tiny.path("run");
    run(&eora(2), &decoder, &compressor("rtn-int4"), &folder);
    // The last weight of a tensor of 256,000 bytes.
    let edited = wide_with(|tensor_name, tensor| {
        if tensor_name != name {
            return tensor;
        }
        let shape = tensor.dims().to_vec();
        let mut values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
        *values.last_mut().unwrap() += 1.0;
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    });
    let (calibration, held_out) = (windows(12, 1), windows(6, 2));
    let texts = Texts::new(&calibration).with_held_out(&held_out);
    let resumed = eora(2).run(
        &edited.decoder(),
        &compressor("rtn-int4"),
        texts,
        &folder,
        &NoProgress,
    );
    let difference = match resumed {
        Err(Error::OtherRun { difference, .. }) => difference,
        other => panic!("{other:?}"),
    };
    assert!(difference.starts_with("model "), "{difference}");

    // The same of a checkpoint that is repaired as it is given.
    let describe = |checkpoint: &Checkpoint| {
        let given = CompressedModel::open(checkpoint).unwrap();
        given.describe().unwrap()
    };
    assert_ne!(describe(tiny.checkpoint()), describe(edited.checkpoint()));
}

#[test]
fn a_folder_with_another_run_is_refused_and_says_what_differs() {
    let tiny = tiny();
    let decoder = tiny.decoder();
    let folder = tiny.path("run");
    run(&eora(2), &decoder, &compressor("rtn-int4"), &folder);
    let what = |repair: &Repair, source: &str, seed| {
        let (calibration, held_out) = (windows(12, seed), windows(6, 2));
        let texts = Texts::new(&calibration).with_held_out(&held_out);
        let result = repair.run(&decoder, &compressor(source), texts, &folder, &NoProgress);
        match result {
            Err(Error::OtherRun { difference, .. }) => difference,
            other => panic!("{other:?}"),
        }
    };
    assert!(what(&eora(3), "rtn-int4", 1).starts_with("ranks "));
    assert!(what(&eora(2), "rtn-int3", 1).starts_with("source "));
    assert!(what(&eora(2), "rtn-int4", 7).starts_with("calibration "));
}

#[test]
fn what_does_not_fit_the_dense_model_is_an_error_that_names_it() {
    let tiny = tiny();
    let decoder = tiny.decoder();
    let up = "model.layers.1.mlp.up_proj.weight";
    let error = |other: &TestModel, drop: Option<&str>| -> String {
        let dir = other.path("given");
        let names = other
            .checkpoint()
            .names()
            .filter(|name| Some(*name) != drop);
        let specs = names.map(|name| {
            let info = other.checkpoint().info(name).unwrap();
            tensor_io::TensorSpec::new(name, info.dtype, info.shape.clone())
        });
        let (specs, options) = (specs.collect(), WriteOptions::default());
        let config = other.checkpoint().config();
        let mut writer =
            tensor_io::CheckpointWriter::create(&dir, config, specs, &options).unwrap();
        for name in other
            .checkpoint()
            .names()
            .filter(|name| Some(*name) != drop)
        {
            writer
                .write_bytes(name, &other.checkpoint().bytes(name).unwrap())
                .unwrap();
        }
        writer.finish().unwrap();
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let given = CompressedModel::open(&checkpoint).unwrap();
        let folder = other.path("run");
        let windows = windows(4, 1);
        let texts = Texts::new(&windows);
        let error = eora(2)
            .run(&decoder, &given, texts, &folder, &NoProgress)
            .unwrap_err();
        error.to_string()
    };
    let same = |_: &str, tensor: Tensor| tensor;
    let missing = error(&tiny_with(same), Some(up));
    assert!(
        missing.starts_with("model.layers.1.mlp.up_proj: "),
        "{missing}"
    );
    let norm = "model.layers.0.input_layernorm.weight";
    let scaled = |name: &str, tensor: Tensor| match name {
        n if n == norm => (tensor * 1.5).unwrap(),
        _ => tensor,
    };
    let other = error(&tiny_with(scaled), None);
    assert!(other.contains(norm), "{other}");
}

#[test]
fn activations_that_overflow_are_an_error_that_names_the_layer() {
    let huge = |name: &str, tensor: Tensor| match name {
        "model.layers.1.mlp.up_proj.weight" | "model.layers.1.mlp.gate_proj.weight" => {
            (tensor * 1e30).unwrap()
        }
        _ => tensor,
    };
    let tiny = tiny_with(huge);
    let decoder = tiny.decoder();
    let windows = windows(4, 1);
    let (source, texts) = (compressor("rtn-int8"), Texts::new(&windows));
    let error = eora(2)
        .run(&decoder, &source, texts, tiny.path("run"), &NoProgress)
        .unwrap_err();
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    assert!(
        text.contains("layer 1") && text.contains("input of down_proj"),
        "{text}"
    );
}

#[shared_data::needed("models/stories260K", "data/text")]
#[test]
fn on_a_trained_model_eora_loses_least_on_held_out_tokens() {
    let (checkpoint, calibration, held_out_windows) = trained();
    let decoder = decoder(&checkpoint);
    let folder = tempfile::tempdir().unwrap();
    let repair = |source: &dyn Source, method, name: &str| {
        let repair = eora(8).with_method(method);
        let path = folder.path().join(name);
        let texts = Texts::new(&calibration).with_held_out(&held_out_windows);
        repair
            .run(&decoder, source, texts, path, &NoProgress)
            .unwrap()
    };
    for name in ["wanda-2:4", "gptq-int3"] {
        let none = repair(&compressor(name), None, name);
        let svd = repair(&none, Some(Method::Svd), &format!("{name}-svd"));
        let eora = repair(&none, Some(Method::Eora), &format!("{name}-eora"));
        let loss = [&eora, &svd, &none].map(|repaired| held_out(repaired).loss());
        assert!(loss[0] < loss[1] && loss[1] < loss[2], "{name}: {loss:?}");
        for (eora, svd) in eora.reports().zip(svd.reports()).take(3) {
            // Of the first block both see the same inputs.
            assert!(eora.calibration.after <= svd.calibration.after * (1.0 + 1e-6));
        }
    }
}
