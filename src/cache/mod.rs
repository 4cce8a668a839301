//! Cache bookkeeping (integers) and, in `pool`, the tensors behind it.

pub mod block;
pub mod pool;
