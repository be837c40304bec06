//! Statistics of the inputs of a linear.
