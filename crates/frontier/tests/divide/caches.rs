//! Keys and values in the budget.

use crate::common::{budget, model, options, windows_of, with_frontier};
use candle_core::{DType, Device};
use causal_lm::{CacheSet, Decoder, Model};
use frontier::kv_lazy::CacheConfig;
use frontier::{
    Baseline, Cache, CacheFormat, Data, Error, Frontier, Options, Plan, Target, allocated,
};
use tensor_io::NoProgress;

/// The caches of a plan, by layer.
fn caches(plan: &Plan) -> Vec<Cache> {
    let of_sites = plan.sites.iter().filter_map(|site| site.treatment.cache);
    of_sites.collect()
}

#[test]
fn caches_take_the_bytes_of_the_plan_and_are_measured_as_they_are_decoded() {
    const LEN: usize = 96;
    const CONTEXT: usize = 400;
    let model = model(true);
    let (calibration, comparison) = (windows_of(1, 4, LEN), windows_of(2, 4, LEN));
    let checkpoint = causal_lm::open(model.dir()).unwrap();
    let decoder = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
    let data = Data {
        calibration: &calibration,
        comparison: &comparison,
    };
    for shares in [vec![1.0], vec![0.5]] {
        let mut options = options(Target::Here);
        (options.context, options.batch) = (CONTEXT, 2);
        options.cache_shares = shares.clone();
        options.widths = vec![0.5];
        let dir = model.path("caches");
        let mut frontier = Frontier::measure(&decoder, data, options, dir, &NoProgress).unwrap();
        let dense = frontier.dense_cache_bytes();
        let in_16_bits = frontier.caches_in_16_bits();
        assert!(in_16_bits < dense && 2 * in_16_bits > dense);

        let plan = frontier.plan(frontier.dense_bytes(), &NoProgress).unwrap();
        assert_eq!(plan.cache_bytes, dense);
        assert!(caches(&plan).iter().all(|cache| cache.is_dense()));
        assert_eq!(plan.cache_within(LEN), None);
        // 16 bits are free, and whole caches do less harm than pruned ones.
        let spare = frontier.dense_bytes() - dense / 2;
        let plan = frontier.plan(spare, &NoProgress).unwrap();
        let formats: Vec<CacheFormat> = caches(&plan).iter().map(|c| c.format).collect();
        assert!(
            formats.iter().all(|f| *f != CacheFormat::Stored),
            "{formats:?}"
        );

        for share in [0.0, 0.1, 0.3] {
            let budget = budget(&frontier, share);
            let plan = frontier.plan(budget, &NoProgress).unwrap();
            assert!(plan.bytes() <= budget);
            let of_sites: u64 = plan.sites.iter().map(|site| site.cache_bytes).sum();
            assert_eq!(of_sites, plan.cache_bytes);
            if share == 0.0 {
                let least = shares[0];
                let cheapest = |cache: &Cache| (cache.format, cache.share);
                let all: Vec<_> = caches(&plan).iter().map(cheapest).collect();
                assert_eq!(all, [(CacheFormat::Int4, least); 2]);
            }
            let dst = model.path(&format!("caches-{}-{share}", shares[0]));
            let written = frontier.write(&plan, &dst, &NoProgress).unwrap();
            let saved = std::fs::read(dst.join("cache.json")).unwrap();
            let config: CacheConfig = serde_json::from_slice(&saved).unwrap();
            assert_eq!(Some(&config), plan.cache.as_ref());
            assert_eq!(Plan::load(dst.join("plan.json")).unwrap(), plan);

            let checkpoint = written.open().unwrap();
            let opened = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
            let shapes = Model::load(&opened).unwrap().cache_shapes();
            let found = allocated(&shapes, DType::F32, &config, (CONTEXT, 2)).unwrap();
            assert!(found <= plan.cache_bytes, "{found} of {}", plan.cache_bytes);
            assert!(found as f64 > 0.8 * plan.cache_bytes as f64);

            let decoding = match plan.cache_within(LEN) {
                Some(config) => opened.decoding(config),
                None => opened,
            };
            let found = frontier.divergence(&decoding, &NoProgress).unwrap();
            let difference = (found.mean - plan.measured.mean).abs();
            assert!(difference < 1e-6, "{found:?} {:?}", plan.measured);
            // The caches are part of what was measured.
            let opened = Decoder::new(&checkpoint, DType::F32, &Device::Cpu).unwrap();
            let without = frontier.divergence(&opened, &NoProgress).unwrap();
            assert_ne!(without.mean, found.mean);
            let model = Model::load(&opened).unwrap();
            let mut set = CacheSet::new(&shapes, 1, DType::F32, &Device::Cpu, &config).unwrap();
            model.forward(&[&[1, 2, 3]], &mut set).unwrap();
        }
        let alone = frontier.baseline(Baseline::Caches, spare, &NoProgress);
        let alone = alone.unwrap().expect("caches alone fit");
        assert!(alone.is_dense() && alone.bytes() <= spare);
    }
}

#[test]
fn other_runtimes_keep_every_token_in_16_bits() {
    let model = model(true);
    let mut options = options(Target::Gguf);
    (options.context, options.batch) = (1000, 3);
    with_frontier(&model, options, |frontier| {
        assert_eq!(frontier.dense_cache_bytes(), 2 * 4 * 8 * 2 * 2 * 3000);
        let plan = frontier.plan(budget(frontier, 0.3), &NoProgress).unwrap();
        assert_eq!(plan.cache, None);
        assert!(caches(&plan).iter().all(|cache| cache.is_dense()));
    });
}

#[test]
fn contexts_beyond_counting_and_shares_of_less_than_a_few_tokens_are_refused() {
    let model = model(true);
    let decoder = model.decoder();
    let (calibration, comparison) = (windows_of(1, 4, 40), windows_of(2, 4, 40));
    let data = Data {
        calibration: &calibration,
        comparison: &comparison,
    };
    let refused = |change: &dyn Fn(&mut Options)| {
        let mut options = options(Target::Here);
        change(&mut options);
        let found = Frontier::prepare(&decoder, data, options, model.path("none"), &NoProgress);
        match found.map(|_| ()) {
            Err(Error::Option { option, value, .. }) => (option, value),
            other => panic!("{other:?}"),
        }
    };
    for (context, batch) in [(usize::MAX, 3), (1 << 61, 1), (1_000_001, 1000)] {
        let (option, value) =
            refused(&|options| (options.context, options.batch) = (context, batch));
        assert_eq!(option, "context");
        assert!(value.contains(&context.to_string()), "{value}");
    }
    // 0.1 of 4,000 tokens are enough, of a window of 40 they are not.
    let (option, value) = refused(&|options| {
        (options.context, options.cache_shares) = (4000, vec![1.0, 0.1]);
    });
    assert_eq!(
        (option, value.as_str()),
        ("cache_shares", "0.1 of 40 tokens")
    );
}
