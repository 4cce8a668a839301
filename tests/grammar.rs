//! Grammars over a vocabulary of bytes: what may come, what may not, and the same in every batch.

mod fake;

use astrai_rs::config::EngineConfig;
use astrai_rs::engine::{Engine, Request};
use astrai_rs::grammar::{Grammar, GrammarCompiler, GrammarSource, MAX_SOURCE_BYTES};
use astrai_rs::sampler::SamplingOptions;
use fake::{Fake, Outputs, Rng};

const EOS: u32 = 256;
/// A control token, one of two bytes, one that no UTF-8 holds, and one that is too long for the trie.
const SPECIAL: u32 = 257;
const PAIR: u32 = 258;
const VOCAB: usize = 261;

fn compiler() -> GrammarCompiler {
    let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    tokens.extend([Vec::new(), b"a".to_vec(), b"es".to_vec(), b"\xffa".to_vec(), vec![b'a'; 2000]]);
    GrammarCompiler::new(tokens, vec![EOS, SPECIAL], vec![EOS], VOCAB).expect("valid")
}

fn config() -> EngineConfig {
    EngineConfig { vocab_size: VOCAB, eos_token_ids: vec![EOS], ..fake::config() }
}

fn json(schema: &str) -> GrammarSource<'_> {
    GrammarSource::JsonSchema { schema, any_whitespace: false }
}

fn bytes(tokens: &[u32]) -> Vec<u8> {
    let bytes = tokens.iter().flat_map(|&id| match id {
        EOS => Vec::new(),
        PAIR => b"es".to_vec(),
        id => vec![u8::try_from(id).unwrap_or(0xff)],
    });
    bytes.collect()
}

fn text(tokens: &[u32]) -> String {
    String::from_utf8(bytes(tokens)).expect("no other token may come")
}

const CHOICES: [&str; 4] = ["yes", "yesterday", "no", "größer \"1\"\n"];

fn choice() -> String {
    let quoted = CHOICES.map(|choice| serde_json::to_string(choice).expect("a string"));
    format!("start: {}", quoted.join(" | "))
}

const POINT: &str = r#"{"type": "object", "properties": {"x": {"type": "integer", "minimum": -99, "maximum": 99},
    "tag": {"enum": ["a", "b\n"]}}, "required": ["x", "tag"], "additionalProperties": false}"#;

fn is_point(text: &str) -> bool {
    let value: serde_json::Value = serde_json::from_str(text).expect("JSON");
    let in_range = value["x"].as_i64().is_some_and(|x| (-99..=99).contains(&x));
    let compact = !text.bytes().any(|byte| byte.is_ascii_whitespace());
    in_range && ["a", "b\n"].map(Some).contains(&value["tag"].as_str()) && compact
}

fn is_decimal(text: &str) -> bool {
    let (whole, part) = text.split_once('.').expect("a point");
    let is_digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    is_digits(whole) && is_digits(part) && part.len() <= 3
}

/// A language with a checker of whole texts that knows nothing of grammars.
struct Language {
    grammar: Grammar,
    holds: fn(&str) -> bool,
}

fn languages() -> [Language; 3] {
    let compiler = compiler();
    let compile = |source| compiler.compile(source).expect("valid");
    [
        Language {
            grammar: compile(GrammarSource::Lark(&choice())),
            holds: |t| CHOICES.contains(&t),
        },
        Language {
            grammar: compile(GrammarSource::Regex(r"[0-9]+\.[0-9]{1,3}")),
            holds: is_decimal,
        },
        Language { grammar: compile(json(POINT)), holds: is_point },
    ]
}

fn requests(languages: &[Language]) -> Vec<Request> {
    let mut rng = Rng(3);
    let request = |index: usize| {
        let options = SamplingOptions {
            n: 1 + rng.below(3) as i64,
            temperature: if rng.chance(30) { 0.0 } else { 1.0 },
            repetition_penalty: if rng.chance(30) { 1.3 } else { 1.0 },
            top_k: if rng.chance(30) { 5 } else { 0 },
            logprobs: rng.chance(20).then_some(2),
            prompt_logprobs: rng.chance(20).then_some(1),
            max_tokens: 30,
            ..SamplingOptions::default()
        };
        let prompt = (0..=rng.below(40)).map(|_| rng.below(256) as u32).collect();
        let mut request = fake::request(prompt, &options, &config());
        // Every fourth has none.
        request.grammar =
            languages.get(index % 4).map(|language: &Language| language.grammar.clone());
        request
    };
    (0..60).map(request).collect()
}

fn run(requests: &[Request], config: &EngineConfig) -> (Outputs, u64) {
    let mut engine: Engine<Fake> = fake::engine(config);
    for request in requests {
        engine.submit(request.clone()).expect("fits");
    }
    (fake::run(&mut engine), engine.stats().preemptions)
}

#[test]
fn outputs_follow_their_grammar_whatever_the_batch() {
    let languages = languages();
    let requests = requests(&languages);
    let (outputs, _) = run(&requests, &config());
    let mut complete = [0; 3];
    for (id, output) in &outputs {
        let index = id.request as usize % 4;
        if let Some(language) = languages.get(index)
            && matches!(output.finish, Some(("stop", _)))
        {
            assert!((language.holds)(&text(&output.tokens)), "{:?}", text(&output.tokens));
            complete[index] += 1;
        }
    }
    assert!(complete.iter().all(|&count| count > 10), "{complete:?}");

    let one_by_one = EngineConfig { max_num_seqs: 1, ..config() };
    let small_budget = EngineConfig { max_num_batched_tokens: 7, ..config() };
    assert_eq!(run(&requests, &one_by_one).0, outputs);
    assert_eq!(run(&requests, &small_budget).0, outputs);
    let (preempted, preemptions) = run(&requests, &EngineConfig { num_blocks: 9, ..config() });
    assert!(preemptions > 5, "{preemptions}");
    assert_eq!(preempted, outputs);
}

#[test]
fn greedy_takes_the_likeliest_allowed_id() {
    let grammar = compiler().compile(GrammarSource::Lark(&choice())).expect("valid");
    for first in 0..40 {
        let mut request = fake::request(vec![first, 7], &fake::greedy(30), &config());
        request.grammar = Some(grammar.clone());
        let (outputs, _) = run(&[request], &config());
        let output = outputs.values().next().expect("one");

        let mut tokens = vec![first, 7];
        loop {
            let so_far = bytes(&tokens[2..]);
            let open = CHOICES.iter().filter(|choice| choice.as_bytes().starts_with(&so_far));
            let longer = open.clone().filter(|choice| choice.len() > so_far.len()).count();
            let is_choice = open.count() > longer;
            if longer == 0 || tokens.last() == Some(&EOS) {
                break;
            }
            let is_allowed = |id: &u32| match *id {
                EOS => is_choice,
                SPECIAL => false,
                id => {
                    let longer = [&so_far[..], &bytes(&[id])].concat();
                    id <= PAIR && CHOICES.iter().any(|c| c.as_bytes().starts_with(&longer))
                }
            };
            let logits = fake::logits_after(&tokens, VOCAB);
            let ids = (0..VOCAB as u32).filter(is_allowed);
            let best = ids.max_by(|&a, &b| logits[a as usize].total_cmp(&logits[b as usize]));
            tokens.push(best.expect("some"));
        }
        assert_eq!(output.tokens, tokens[2..]);
        assert_eq!(output.finish, Some(("stop", String::new())));
    }
}

#[test]
fn a_grammar_that_other_parameters_contradict_fails_its_own_request_only() {
    let grammar = compiler().compile(GrammarSource::Regex("[ab]+")).expect("valid");
    let options = SamplingOptions { allowed_token_ids: Some(vec![99]), ..fake::greedy(5) };
    let mut contradiction = fake::request(vec![1], &options, &config());
    contradiction.grammar = Some(grammar.clone());
    let mut sound = fake::request(vec![1], &fake::greedy(5), &config());
    sound.grammar = Some(grammar);
    let (outputs, _) = run(&[contradiction, sound], &config());
    let finishes: Vec<_> =
        outputs.values().map(|output| output.finish.clone().expect("over")).collect();
    assert_eq!(finishes[0].0, "error");
    assert!(finishes[0].1.contains("no token is left to sample: structured_outputs,"));
    assert!(finishes[1].0 != "error");
}

/// Texts of one to three letters, any of which a model may call its end.
#[test]
fn what_ends_a_text_is_not_part_of_it() {
    let tokens = (0..=255).map(|byte| vec![byte]).collect();
    let eos = u32::from(b'x');
    let compiler = GrammarCompiler::new(tokens, Vec::new(), vec![eos], VOCAB).expect("valid");
    let grammar = compiler.compile(GrammarSource::Regex("[x-z]{3,}")).expect("valid");
    let config = EngineConfig { eos_token_ids: vec![eos], ..config() };
    let stop = u32::from(b'y');
    for (ignore_eos, first) in (0..200).map(|first| (first % 2 == 0, first)) {
        let options = SamplingOptions {
            ignore_eos,
            stop_token_ids: vec![i64::from(stop)],
            ..fake::greedy(30)
        };
        let mut request = fake::request(vec![first], &options, &config);
        request.grammar = Some(grammar.clone());
        let (outputs, _) = run(&[request], &config);
        let output = outputs.values().next().expect("one");
        let (last, text) = output.tokens.split_last().expect("some");
        assert!(text.iter().all(|&id| id == u32::from(b'z')) && text.len() >= 3, "{text:?}");
        let finish = if *last == eos { String::new() } else { stop.to_string() };
        assert_eq!(output.finish, Some(("stop", finish)));
    }
}

#[test]
fn what_is_wrong_with_a_grammar_is_named() {
    let long = "a".repeat(MAX_SOURCE_BYTES + 1);
    let deep = format!("{}a{}", "(".repeat(300), ")".repeat(300));
    let deep_schema = format!("{}{}", r#"{"items":"#.repeat(300), "}".repeat(300));
    let cases = [
        (json("{"), "the schema is not valid JSON: EOF"),
        (json(&deep_schema), "recursion limit exceeded"),
        (json("3"), "a JSON schema must be an object or true; given: 3"),
        (json(r#"{"x-guidance": {"lenient": true}}"#), "\"x-guidance\" is not supported"),
        (json(r#"{"type": "array", "uniqueItems": true}"#), "uniqueItems"),
        (json(r#"{"not": {"type": "string"}}"#), "\"not\""),
        (json(r#"{"if": {}, "then": {}}"#), "\"if\", \"then\""),
        (json(r#"{"type": "strin"}"#), "strin"),
        (json(r#"{"type": "string", "format": "colour"}"#), "Unknown format: colour"),
        (json(r##"{"$ref": "#/$defs/none"}"##), "none"),
        (json(r#"{"minimum": 3, "maximum": 2, "type": "integer"}"#), "minimum (3) is greater"),
        (GrammarSource::Regex("("), "unclosed group"),
        (GrammarSource::Regex("(?=a)b"), "look-around"),
        (GrammarSource::Regex(&long), "at most 262144 bytes; given: 262145"),
        (GrammarSource::Regex(&deep), "at most 200 brackets; given: 300"),
        (GrammarSource::Lark("start: thing"), "unknown name: \"thing\""),
        (GrammarSource::Lark("begin: \"a\""), "start"),
    ];
    let compiler = compiler();
    for (source, message) in cases {
        let error = compiler.compile(source).expect_err("wrong").to_string();
        assert!(error.contains(message), "{error:?} lacks {message:?}");
        assert!(!error.contains("backtrace"), "{error}");
    }
    let no_end = GrammarCompiler::new(vec![b"a".to_vec()], Vec::new(), vec![7], 1);
    assert!(no_end.expect_err("no end").to_string().contains("need an end-of-text id"));
}
