//! [`Grammar`]: outputs that follow a JSON schema, a regular expression or a context-free grammar.
//!
//! The `llguidance` crate does the parsing. It works on the bytes of tokens, which the caller gives
//! once, as a plain table: no tokenizer is known here.

mod worker;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, SimpleVob, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
pub(crate) use worker::MaskWorker;

use crate::error::{Error, Result};

/// Longest source of a grammar, in bytes.
pub const MAX_SOURCE_BYTES: usize = 1 << 18;

/// Deepest nesting of brackets in a regular expression or Lark grammar: their parsers recurse.
pub const MAX_NESTING: usize = 200;

/// Most ids that the parser's trie can hold.
const MAX_VOCABULARY: usize = 1 << 21;

/// Longest token that the parser's trie can hold; longer ones are never allowed by a grammar.
const MAX_TOKEN_BYTES: usize = 1000;

/// What an output must look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GrammarSource<'a> {
    /// JSON that is valid by this JSON schema.
    JsonSchema {
        /// The schema, as JSON.
        schema: &'a str,
        /// Whether the output may hold white space between its parts. Small models go on with it
        /// for ever.
        any_whitespace: bool,
    },
    /// Text that a regular expression (of Rust's `regex` crate) matches as a whole.
    Regex(&'a str),
    /// Text of a grammar in llguidance's variant of Lark.
    Lark(&'a str),
}

/// A model's vocabulary as grammars need it. Building one takes some 0.2 s for 50,000 tokens.
pub struct GrammarCompiler {
    factory: ParserFactory,
}

impl GrammarCompiler {
    /// A compiler for a model of `vocab_size` ids, whose texts end with any of `eos_token_ids`.
    ///
    /// `tokens` holds each id's bytes; empty for an id without text, which no grammar allows.
    /// `special` lists the ids of control tokens: a Lark grammar may name them, text never holds them.
    pub fn new(
        tokens: Vec<Vec<u8>>,
        special: Vec<u32>,
        mut eos_token_ids: Vec<u32>,
        vocab_size: usize,
    ) -> Result<Self> {
        eos_token_ids.retain(|&id| (id as usize) < vocab_size);
        if vocab_size > MAX_VOCABULARY {
            return Err(Error::invalid(format!(
                "structured outputs allow {MAX_VOCABULARY} ids; given: {vocab_size}"
            )));
        }
        let Some(&first) = eos_token_ids.first() else {
            return Err(Error::unsupported(
                "structured outputs need an end-of-text id, and this model names none",
            ));
        };
        let mut words: Vec<Vec<u8>> = tokens.into_iter().map(text).collect();
        words.resize(vocab_size, Vec::new());
        // An end-of-text token ends the text, whatever its bytes are.
        for id in special.into_iter().chain(eos_token_ids.iter().copied()) {
            if let Some(word) = words.get_mut(id as usize)
                && word.first().is_some_and(|&byte| byte != TokTrie::SPECIAL_TOKEN_MARKER)
            {
                word.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
            }
        }
        let info = TokRxInfo::new(vocab_size as u32, first);
        let trie = TokTrie::from(&info, &words).with_eos_tokens(&eos_token_ids);
        let mut factory = ParserFactory::new_simple(&(Arc::new(ApproximateTokEnv::new(trie)) as _))
            .map_err(|error| Error::bug(format!("structured outputs: {error}")))?;
        let limits = factory.quiet().limits_mut();
        limits.verbose_errors = false;
        // A mask may take some 5 ms, and a sample's lexer some 50 MB, before its request fails: all
        // others wait for it.
        limits.step_lexer_fuel = 60_000;
        limits.step_max_items = 25_000;
        limits.max_lexer_states = 25_000;
        Ok(Self { factory })
    }

    /// The automaton of a grammar; [`Error::invalid`] says what in it is wrong or not supported.
    pub fn compile(&self, source: GrammarSource<'_>) -> Result<Grammar> {
        let grammar = top_level(source)?;
        let made =
            catch_unwind(AssertUnwindSafe(|| Matcher::new(self.factory.create_parser(grammar))));
        let matcher = made.map_err(|_| Error::bug("the grammar compiler panicked"))?;
        if let Some(message) = matcher.get_error() {
            return Err(Error::invalid(plain(&message)));
        }
        let grammar = Grammar(Arc::new(matcher));
        let mut first = grammar.start();
        first.prepare();
        if first.mask.is_none() {
            return Err(first.error());
        }
        Ok(grammar)
    }
}

impl fmt::Debug for GrammarCompiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrammarCompiler").finish_non_exhaustive()
    }
}

/// A token's bytes; nothing for what no text can hold, so that the marker stays unique.
fn text(token: Vec<u8>) -> Vec<u8> {
    let is_text = token.len() <= MAX_TOKEN_BYTES
        && token.first().is_some_and(|&byte| byte != TokTrie::SPECIAL_TOKEN_MARKER);
    if is_text { token } else { Vec::new() }
}

fn top_level(source: GrammarSource<'_>) -> Result<TopLevelGrammar> {
    let text = match source {
        GrammarSource::JsonSchema { schema, .. } => schema,
        GrammarSource::Regex(text) | GrammarSource::Lark(text) => text,
    };
    if text.len() > MAX_SOURCE_BYTES {
        return Err(Error::invalid(format!(
            "a grammar may have at most {MAX_SOURCE_BYTES} bytes; given: {}",
            text.len()
        )));
    }
    match source {
        GrammarSource::JsonSchema { schema, any_whitespace } => json_schema(schema, any_whitespace),
        GrammarSource::Regex(regex) => {
            check_nesting(regex)?;
            Ok(TopLevelGrammar::from_regex(regex))
        }
        GrammarSource::Lark(grammar) => {
            check_nesting(grammar)?;
            Ok(TopLevelGrammar::from_lark(grammar.to_owned()))
        }
    }
}

fn json_schema(schema: &str, any_whitespace: bool) -> Result<TopLevelGrammar> {
    let schema: Value = serde_json::from_str(schema)
        .map_err(|error| Error::invalid(format!("the schema is not valid JSON: {error}")))?;
    let mut schema = match schema {
        Value::Object(schema) => schema,
        Value::Bool(true) => serde_json::Map::new(),
        other => {
            return Err(Error::invalid(format!(
                "a JSON schema must be an object or true; given: {other:.80}"
            )));
        }
    };
    // The key would switch off checks of the compiler.
    let options = json!({ "whitespace_flexible": any_whitespace });
    if schema.insert("x-guidance".into(), options).is_some() {
        return Err(Error::invalid("the schema's \"x-guidance\" is not supported"));
    }
    Ok(TopLevelGrammar::from_json_schema(Value::Object(schema)))
}

fn check_nesting(source: &str) -> Result<()> {
    let (mut depth, mut deepest) = (0_usize, 0);
    for byte in source.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    if deepest > MAX_NESTING {
        return Err(Error::invalid(format!(
            "a grammar may nest at most {MAX_NESTING} brackets; given: {deepest}"
        )));
    }
    Ok(())
}

/// A message of llguidance without the stack traces that it may carry.
fn plain(message: &str) -> String {
    message.split("\n<").next().unwrap_or(message).trim().to_owned()
}

/// A compiled grammar at its start. Any number of samples may begin from one.
#[derive(Clone)]
pub struct Grammar(Arc<Matcher>);

impl Grammar {
    /// The state of one sample's output before its first token.
    #[must_use]
    pub fn start(&self) -> GrammarState {
        GrammarState { start: self.clone(), matcher: None, mask: None }
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Grammar").finish_non_exhaustive()
    }
}

/// Where one sample's output stands in its grammar.
pub struct GrammarState {
    start: Grammar,
    /// From the first mask on: samples that wait take no memory. It shares nothing with others.
    matcher: Option<Matcher>,
    mask: Option<SimpleVob>,
}

impl GrammarState {
    /// Finds out which tokens may come next; [`Self::mask`] has them.
    pub fn prepare(&mut self) {
        let matcher = self.matcher.get_or_insert_with(|| self.start.0.deep_clone());
        self.mask = matcher.compute_mask_or_eos().ok();
    }

    /// The tokens that may come next, one bit each, from the lowest bit of the first word on.
    pub fn mask(&self) -> Result<&[u32]> {
        match &self.mask {
            Some(mask) => Ok(mask.as_slice()),
            None => Err(self.error().context("structured_outputs")),
        }
    }

    /// Takes the token that came; true where the output is complete with it and nothing can follow.
    pub fn advance(&mut self, token: u32) -> Result<bool> {
        self.mask = None;
        let matcher = self.matcher.get_or_insert_with(|| self.start.0.deep_clone());
        let is_taken = matcher.consume_token(token).is_ok();
        let is_stopped = matcher.is_stopped();
        if is_taken && (!is_stopped || matcher.stop_reason().is_ok()) {
            return Ok(is_stopped);
        }
        Err(self.error().context("structured_outputs"))
    }

    fn error(&self) -> Error {
        let matcher = self.matcher.as_ref().unwrap_or(&self.start.0);
        let message = matcher.get_error().unwrap_or_else(|| matcher.stop_reason().to_string());
        match plain(&message).as_str() {
            "NoExtension" | "NoExtensionBias" => Error::invalid("no output satisfies it"),
            message => Error::invalid(message),
        }
    }
}

impl fmt::Debug for GrammarState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrammarState").finish_non_exhaustive()
    }
}
