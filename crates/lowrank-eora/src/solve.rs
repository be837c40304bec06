//! The best correction of rank r of a layer.
