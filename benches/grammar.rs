//! What structured outputs cost: reading a vocabulary, compiling a grammar, one mask.
//!
//! `cargo bench --bench grammar -- FILE.gguf` takes a byte-level vocabulary from a file (`SmolLM2` has
//! 49,152 ids). Outputs are random walks through each grammar that prefer short tokens, as text does.
//! Ends with one JSON line; masks in microseconds per step.
#![allow(clippy::print_stdout, reason = "a bench prints its figures")]

use std::collections::HashMap;
use std::path::Path;
use std::time::Instant;

use astrai_rs::checkpoint::gguf::{self, Value};
use astrai_rs::grammar::{GrammarCompiler, GrammarSource};

const STEPS: usize = 2000;
const EOS: u32 = 2;

const SOURCES: [(&str, GrammarSource<'static>); 5] = [
    (
        "person",
        json(
            r#"{"type": "object", "properties": {"name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120}, "email": {"type": "string", "format": "email"}},
        "required": ["name", "age", "email"], "additionalProperties": false}"#,
        ),
    ),
    (
        "tree",
        json(
            r##"{"$ref": "#/$defs/node", "$defs": {"node": {"type": "object", "properties": {
        "value": {"type": "number"}, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
        "required": ["value", "children"], "additionalProperties": false}}}"##,
        ),
    ),
    ("any_json", json(r#"{"type": "object"}"#)),
    ("regex", GrammarSource::Regex(r"[A-Z][a-z]+( [a-z]+){3,20}, \d{4}-\d{2}-\d{2}\.")),
    (
        "lark",
        GrammarSource::Lark(
            "start: sum\nsum: term (\" + \" term)*\nterm: /[0-9]+/ | \"(\" sum \")\"",
        ),
    ),
];

const fn json(schema: &str) -> GrammarSource<'_> {
    GrammarSource::JsonSchema { schema, any_whitespace: false }
}

/// GPT-2's printable stand-ins for bytes.
fn byte_characters() -> HashMap<char, u8> {
    let is_printable = |byte: u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..);
    let mut others = 0x100..;
    (0..=u8::MAX)
        .map(|byte| match byte {
            byte if is_printable(byte) => (char::from(byte), byte),
            byte => (others.next().and_then(char::from_u32).expect("few"), byte),
        })
        .collect()
}

fn vocabulary(path: &Path) -> Vec<Vec<u8>> {
    let bytes = byte_characters();
    let token = |value: Value<'_>| match value {
        Value::String(text) => text.chars().map(|c| bytes.get(&c).copied()).collect::<Option<_>>(),
        _ => None,
    };
    let tokens =
        gguf::metadata(path, |mut metadata| match metadata.remove("tokenizer.ggml.tokens") {
            Some(Value::Array(tokens)) => {
                tokens.into_iter().map(|value| token(value).unwrap_or_default()).collect()
            }
            _ => panic!("no tokens"),
        });
    tokens.expect("a GGUF file")
}

/// Microseconds of each mask of random walks.
fn masks_us(compiler: &GrammarCompiler, source: GrammarSource<'_>, tokens: &[Vec<u8>]) -> Vec<f64> {
    let grammar = compiler.compile(source).expect("valid");
    let (mut state, mut times, mut seed) = (grammar.start(), Vec::new(), 1_u64);
    while times.len() < STEPS {
        let start = Instant::now();
        state.prepare();
        times.push(start.elapsed().as_secs_f64() * 1e6);
        let mask = state.mask().expect("some");
        let is_allowed = |id: &usize| mask[id / 32] >> (id % 32) & 1 == 1;
        let mut next = None;
        for _ in 0..400 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let id = (seed >> 33) as usize % tokens.len();
            if is_allowed(&id) && tokens[id].len() <= 6 {
                next = Some(id as u32);
                break;
            }
        }
        let first = || (0..tokens.len()).find(is_allowed).map(|id| id as u32);
        let token = next.or_else(first).expect("a token is allowed");
        if token == EOS || state.advance(token).expect("allowed") {
            state = grammar.start();
        }
    }
    times.sort_by(f64::total_cmp);
    times
}

fn main() {
    let Some(path) = std::env::args().skip(1).find(|argument| !argument.starts_with('-')) else {
        println!(
            "give a GGUF file with a byte-level vocabulary: cargo bench --bench grammar -- FILE.gguf"
        );
        return;
    };
    let tokens = vocabulary(Path::new(&path));
    let start = Instant::now();
    let compiler = GrammarCompiler::new(tokens.clone(), vec![0, 1, EOS], vec![EOS], tokens.len())
        .expect("valid");
    let build_ms = start.elapsed().as_secs_f64() * 1e3;
    println!("vocabulary of {} ids read in {build_ms:.0} ms", tokens.len());
    let (mut all, mut parts) = (Vec::new(), Vec::new());
    for (name, source) in SOURCES {
        let start = Instant::now();
        compiler.compile(source).expect("valid");
        let compile_ms = start.elapsed().as_secs_f64() * 1e3;
        let times = masks_us(&compiler, source, &tokens);
        let (median, p99) = (times[times.len() / 2], times[times.len() * 99 / 100]);
        println!("{name:10} compile {compile_ms:6.2} ms   mask {median:7.1} µs   p99 {p99:8.1} µs");
        parts.push(format!("\"{name}_mask_us\": {median:.1}, \"{name}_mask_p99_us\": {p99:.1}"));
        all.extend(times);
    }
    all.sort_by(f64::total_cmp);
    let median = all[all.len() / 2];
    println!(
        "{{\"vocabulary\": {}, \"build_ms\": {build_ms:.0}, \"mask_us\": {median:.1}, {}}}",
        tokens.len(),
        parts.join(", ")
    );
}
