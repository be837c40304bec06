//! Nuclear norm, its L1,2 surrogate and entropy of hidden states.
