//! Golden values: losses of nine compressors, and of their repair by plain SVD and by EoRA, on inputs that a linear
//! congruential generator makes. They were computed by two programs that share no code with this crate (numpy, and for
//! most rows a second one in Rust): compressors and solver have to reproduce them.

use faer::Mat;
use lowrank_eora::compress::{Compressor, Inputs};
use lowrank_eora::repair::layer::{Options, Route, Weighting, Whitening, solve};

/// Numbers in [-1, 1).
struct Generator(u64);

impl Generator {
    fn matrix(&mut self, rows: usize, cols: usize) -> Mat<f64> {
        let mut matrix = Mat::zeros(rows, cols);
        for i in 0..rows {
            for j in 0..cols {
                self.0 = self
                    .0
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                matrix[(i, j)] = 2.0 * ((self.0 >> 11) as f64 / (1u64 << 53) as f64) - 1.0;
            }
        }
        matrix
    }
}

/// W (12 × 16), X (16 × 64) with correlated rows of very different size, and H = X Xᵀ.
struct Case {
    w: Mat<f64>,
    x: Mat<f64>,
    h: Mat<f64>,
}

fn case() -> Case {
    let mut generator = Generator(1);
    let w = generator.matrix(12, 16);
    let z = generator.matrix(16, 64);
    let p = generator.matrix(16, 16);
    let mix = Mat::<f64>::identity(16, 16) + 0.3 * &p;
    let mut x = &mix * &z;
    for j in 0..16 {
        for t in 0..64 {
            x[(j, t)] *= 0.5f64.powi((j % 5) as i32);
        }
    }
    let h = &x * x.transpose();
    Case { w, x, h }
}

impl Case {
    /// D of a compressor.
    fn error(&self, name: &str) -> Mat<f64> {
        let compressor: Compressor = name.parse().expect("a name");
        let compressed = compressor
            .compress(self.w.as_ref(), Some(Inputs::Gram(self.h.as_ref())))
            .expect("valid inputs");
        &self.w - &compressed.weight
    }
}

/// ‖(D − B A) X‖ of the crate's correction under a weighting, and what its spectrum says that it is.
fn repaired(case: &Case, d: &Mat<f64>, weighting: Weighting<'_>, route: Route, rank: usize) -> f64 {
    let options = Options::default().with_route(route);
    let solution = solve(d.as_ref(), &weighting, rank, &options).expect("solves");
    let factors = &solution.factors;
    assert_eq!((factors.b.ncols(), factors.a.nrows()), (rank, rank));
    ((d - &factors.b * &factors.a) * &case.x).norm_l2()
}

const EXACT: [Route; 3] = [
    Route::Gram,
    Route::Factor(Whitening::Eigen),
    Route::Factor(Whitening::Cholesky),
];

fn assert_printed(found: f64, expected: f64, what: &str) {
    assert!(
        (found - expected).abs() <= 0.5000001e-6,
        "{what}: {found}, expected {expected}"
    );
}

#[test]
fn the_inputs_are_the_published_ones() {
    let Case { w, x, h } = case();
    assert_printed(w[(0, 0)], -0.153582, "W");
    assert_printed(w[(0, 2)], 0.296719, "W");
    assert_printed(x[(0, 1)], 0.454340, "X");
    let output = (&w * &x).norm_l2();
    assert!((output - 24.24760035075741).abs() < 1e-12, "{output}");
    let trace: f64 = (0..16).map(|j| h[(j, j)]).sum();
    assert!((trace - 172.94164779479502).abs() < 1e-11, "{trace}");
}

#[test]
fn rounding_to_three_bits_agrees_to_all_digits() {
    let case = case();
    let d = case.error("rtn-int3-g8-exact");
    assert!((d.norm_l2() - 0.9459978368373947).abs() < 1e-14);
    let dx = &d * &case.x;
    assert!((dx.norm_l2() - 3.1899469423599105).abs() < 1e-13);
    for route in EXACT {
        let plain = repaired(&case, &d, Weighting::Identity, route, 3);
        assert!((plain - 1.7033139565910513).abs() < 1e-12, "{route:?}");
        for (rank, expected) in [
            (1, 2.1305660709516903),
            (2, 1.5884241392597949),
            (3, 1.2343038187955053),
            (6, 0.3967066962033994),
        ] {
            let found = repaired(&case, &d, Weighting::Gram(case.h.as_ref()), route, rank);
            assert!(
                (found - expected).abs() < 1e-11,
                "{route:?}, {rank}: {found}"
            );
        }
    }
    let all = repaired(&case, &d, Weighting::Gram(case.h.as_ref()), Route::Gram, 12);
    assert!(all < 1e-12, "{all}");
}

/// Name, ‖DX‖, and what plain SVD and EoRA leave of it at ranks 1, 3 and 6.
type Row = (&'static str, f64, [(f64, f64); 3]);

#[test]
fn nine_compressors_and_their_repairs_have_the_published_losses() {
    let rows: [Row; 9] = [
        (
            "rtn-int4-g8-exact",
            1.318587,
            [
                (1.230983, 0.901943),
                (0.851588, 0.512259),
                (0.434958, 0.133047),
            ],
        ),
        (
            "rtn-int4-g8-sym-exact",
            1.809632,
            [
                (1.572493, 1.367322),
                (1.180275, 0.760235),
                (0.673678, 0.221296),
            ],
        ),
        (
            "rtn-int3-g8-sym-exact",
            3.755032,
            [
                (3.569531, 2.988658),
                (2.836292, 1.778722),
                (1.326804, 0.599670),
            ],
        ),
        (
            "gptq-int4-g8-exact",
            1.316719,
            [
                (1.160315, 0.898351),
                (0.963018, 0.465464),
                (0.499902, 0.205048),
            ],
        ),
        (
            "gptq-int3-g8-exact",
            2.732452,
            [
                (2.521978, 2.127981),
                (2.004845, 1.164383),
                (1.278566, 0.460488),
            ],
        ),
        (
            "gptq-int3-g8-exact-act",
            2.297672,
            [
                (1.885776, 1.662234),
                (1.262151, 1.007678),
                (0.857887, 0.454763),
            ],
        ),
        (
            "magnitude-2:4",
            9.008309,
            [
                (7.182065, 6.664876),
                (6.347851, 3.526215),
                (3.806588, 1.139854),
            ],
        ),
        (
            "wanda-2:4",
            3.202170,
            [
                (2.820534, 2.478213),
                (2.390850, 1.570131),
                (1.700630, 0.754933),
            ],
        ),
        (
            "sparsegpt-2:4",
            2.563378,
            [
                (2.387635, 2.135610),
                (1.957299, 1.495962),
                (1.434229, 0.832858),
            ],
        ),
    ];
    let case = case();
    for (name, loss, repairs) in rows {
        let d = case.error(name);
        assert_printed((&d * &case.x).norm_l2(), loss, name);
        for (rank, (plain, best)) in [1, 3, 6].into_iter().zip(repairs) {
            let what = format!("{name}, rank {rank}");
            let identity = repaired(&case, &d, Weighting::Identity, Route::Auto, rank);
            assert_printed(identity, plain, &what);
            for route in EXACT {
                let weighting = Weighting::Gram(case.h.as_ref());
                assert_printed(repaired(&case, &d, weighting, route, rank), best, &what);
            }
        }
    }
}
