//! The tables of all architectures.

use super::{AloneNames, DeltaNames, ExpertNames, FusedNames, LinearName, Module, Rows, Table};

const Q: Module = Module::one("self_attn.q_proj", &[LinearName::Q]);
const K: Module = Module::one("self_attn.k_proj", &[LinearName::K]);
const V: Module = Module::one("self_attn.v_proj", &[LinearName::V]);
const O: Module = Module::one("self_attn.o_proj", &[LinearName::O]);
const GATE: Module = Module::one("mlp.gate_proj", &[LinearName::Gate]);
const UP: Module = Module::one("mlp.up_proj", &[LinearName::Up]);
const DOWN: Module = Module::one("mlp.down_proj", &[LinearName::Down]);
const QKV: Module = Module::stacked(
    "self_attn.qkv_proj",
    &[LinearName::Q, LinearName::K, LinearName::V],
);
const GATE_UP: Module = Module::stacked("mlp.gate_up_proj", &[LinearName::Gate, LinearName::Up]);

/// Llama's names, which most architectures have.
pub(crate) const LLAMA: Table = Table {
    prefix: "model.",
    embedding: "embed_tokens.weight",
    final_norm: "norm",
    heads: &["lm_head.weight"],
    modules: &[Q, K, V, O, GATE, UP, DOWN],
    attention_before: Some("input_layernorm"),
    attention_after: None,
    mlp_before: Some("post_attention_layernorm"),
    mlp_after: None,
    q_norm: "self_attn.q_norm",
    k_norm: "self_attn.k_norm",
    delta: None,
    experts: None,
    beside: &[],
};

const QWEN_EXPERTS: ExpertNames = ExpertNames {
    alone: Some(AloneNames {
        router: "mlp.gate",
        before: "mlp.experts.",
        linears: ["gate_proj", "up_proj", "down_proj"],
    }),
    fused: FusedNames {
        router: "mlp.gate",
        gate_up: "mlp.experts.gate_up_proj",
        down: "mlp.experts.down_proj",
    },
    shared_gate: "mlp.shared_expert_gate",
    novices: "mlp.novices",
};

/// OLMoE and Qwen3's mixtures.
pub(crate) const OLMOE: Table = Table {
    experts: Some(QWEN_EXPERTS),
    ..LLAMA
};

/// Qwen2's mixtures, with an expert for every token.
pub(crate) const QWEN2_MOE: Table = Table {
    modules: &[
        Q,
        K,
        V,
        O,
        GATE,
        UP,
        DOWN,
        Module::one("mlp.shared_expert.gate_proj", &[LinearName::SharedGate]),
        Module::one("mlp.shared_expert.up_proj", &[LinearName::SharedUp]),
        Module::one("mlp.shared_expert.down_proj", &[LinearName::SharedDown]),
    ],
    experts: Some(QWEN_EXPERTS),
    ..LLAMA
};

/// Mixtral.
pub(crate) const MIXTRAL: Table = Table {
    experts: Some(ExpertNames {
        alone: Some(AloneNames {
            router: "block_sparse_moe.gate",
            before: "block_sparse_moe.experts.",
            linears: ["w1", "w3", "w2"],
        }),
        ..QWEN_EXPERTS
    }),
    ..LLAMA
};

/// Granite's mixtures.
pub(crate) const GRANITE_MOE: Table = Table {
    experts: Some(ExpertNames {
        alone: None,
        fused: FusedNames {
            router: "block_sparse_moe.router.layer",
            gate_up: "block_sparse_moe.input_linear.weight",
            down: "block_sparse_moe.output_linear.weight",
        },
        novices: "block_sparse_moe.novices",
        ..QWEN_EXPERTS
    }),
    ..LLAMA
};

/// Gemma: norms before and after both halves.
pub(crate) const GEMMA: Table = Table {
    attention_after: Some("post_attention_layernorm"),
    mlp_before: Some("pre_feedforward_layernorm"),
    mlp_after: Some("post_feedforward_layernorm"),
    ..LLAMA
};

/// OLMo 2: norms after both halves.
pub(crate) const OLMO2: Table = Table {
    attention_before: None,
    attention_after: Some("post_attention_layernorm"),
    mlp_before: None,
    mlp_after: Some("post_feedforward_layernorm"),
    ..LLAMA
};

/// Phi-3: stacked projections.
pub(crate) const PHI3: Table = Table {
    modules: &[QKV, O, GATE_UP, DOWN],
    ..LLAMA
};

/// GLM-4: norms before and after both halves, gate and up stacked.
pub(crate) const GLM4: Table = Table {
    modules: &[Q, K, V, O, GATE_UP, DOWN],
    attention_after: Some("post_self_attn_layernorm"),
    mlp_after: Some("post_mlp_layernorm"),
    ..LLAMA
};

/// Granite 4 without experts.
pub(crate) const GRANITE_HYBRID: Table = Table {
    modules: &[
        Q,
        K,
        V,
        O,
        Module::stacked(
            "shared_mlp.input_linear",
            &[LinearName::Gate, LinearName::Up],
        ),
        Module::one("shared_mlp.output_linear", &[LinearName::Down]),
    ],
    ..LLAMA
};

/// Qwen3.5: attention in some layers, a delta net in the others, and blocks that predict several tokens beside the decoder.
pub(crate) const QWEN3_5: Table = Table {
    modules: &[
        Q,
        K,
        V,
        O,
        Module::one("linear_attn.in_proj_qkv", &[LinearName::DeltaQkv]),
        Module::one("linear_attn.in_proj_z", &[LinearName::DeltaZ]),
        Module::one("linear_attn.in_proj_b", &[LinearName::DeltaB]),
        Module::one("linear_attn.in_proj_a", &[LinearName::DeltaA]),
        Module::one("linear_attn.out_proj", &[LinearName::DeltaOut]),
        GATE,
        UP,
        DOWN,
    ],
    delta: Some(DeltaNames {
        conv: "linear_attn.conv1d.weight",
        log_decay: "linear_attn.A_log",
        dt_bias: "linear_attn.dt_bias",
        norm: "linear_attn.norm.weight",
    }),
    beside: &["mtp."],
    ..LLAMA
};

/// GPT-NeoX and Pythia.
pub(crate) const GPT_NEOX: Table = Table {
    prefix: "gpt_neox.",
    embedding: "embed_in.weight",
    final_norm: "final_layer_norm",
    heads: &["embed_out.weight", "lm_head.weight"],
    modules: &[
        Module {
            path: "attention.query_key_value",
            parts: &[LinearName::Q, LinearName::K, LinearName::V],
            rows: Rows::PerHead,
        },
        Module::one("attention.dense", &[LinearName::O]),
        Module::one("mlp.dense_h_to_4h", &[LinearName::Up]),
        Module::one("mlp.dense_4h_to_h", &[LinearName::Down]),
    ],
    ..LLAMA
};

/// All tables, to find a module by its path alone.
pub(crate) const TABLES: [&Table; 9] = [
    &LLAMA,
    &QWEN3_5,
    &GEMMA,
    &OLMO2,
    &PHI3,
    &GLM4,
    &GRANITE_HYBRID,
    &GPT_NEOX,
    &QWEN2_MOE,
];
