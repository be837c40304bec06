//! Pruning of recurrent networks by order theory, with controls.
