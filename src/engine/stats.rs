//! What an engine tells about itself.

/// Gauges of now and counters since the start. The names are those of the Python `stats()`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Stats {
    /// Samples that are in a step or between two.
    pub num_requests_running: usize,
    /// Samples that wait for a place.
    pub num_requests_waiting: usize,
    /// Cache blocks held by live requests.
    pub kv_blocks_used: usize,
    /// All cache blocks.
    pub kv_blocks_total: usize,
    /// Cache blocks that no request holds but that a prefix can still find.
    pub kv_blocks_cached: usize,
    /// Tokens looked up in the prefix cache.
    pub prefix_cache_queries: u64,
    /// Tokens found there.
    pub prefix_cache_hits: u64,
    /// How often a running sample has lost its blocks.
    pub preemptions: u64,
    /// Prompt tokens of all samples that got their first token.
    pub prompt_tokens_total: u64,
    /// Tokens sampled.
    pub generation_tokens_total: u64,
    /// Age of the engine in seconds.
    pub uptime_s: f64,
    /// Steps finished. With work to do, a number that stands still means a hung step.
    pub steps: u64,
    /// When the engine's loop last turned, in seconds since its start. An idle loop stands still.
    pub heartbeat_s: f64,
}
