//! A synthetic large account: any number of conversations and start tasks, the same in every run, as lines for `cargo
//! local import`.

use serde_json::{Value, json};
use uuid::Uuid;

/// Creation time of the newest conversation, in microseconds since 1970; each one is a little over seven minutes older
/// than the one before.
const NEWEST: i64 = 1_767_225_600_000_000;
const APART: i64 = 427_000_001;

/// The id of a conversation by its number; 0 is the newest.
pub fn conversation_id(number: u64) -> Uuid {
    Uuid::from_u64_pair(mix(number), mix(number ^ 0x5555))
}

/// Whether a conversation is a sub-conversation: one in twenty is.
pub fn is_sub_conversation(number: u64) -> bool {
    number % 20 == 7
}

/// The id of a conversation's sandbox; ten conversations share one.
pub fn sandbox_id(number: u64) -> String {
    format!("{:022x}", u128::from(mix(number / 10 + 0xABCD)) << 16)
}

/// The creation time of a conversation.
pub fn created_at(number: u64) -> String {
    at(NEWEST - i64::try_from(number).expect("an account of this size") * APART)
}

/// A conversation as JSON, about 700 bytes as a row.
pub fn conversation(number: u64) -> Value {
    let random = mix(number);
    let changed = i64::try_from(random % 259_200_000_000).expect("three days");
    let parent = is_sub_conversation(number).then(|| conversation_id(number + 1).simple().to_string());
    let tokens = random % 900_000;
    json!({"type": "conversation", "data": {
        "id": conversation_id(number).simple().to_string(),
        "created_by_user_id": null,
        "sandbox_id": sandbox_id(number),
        "selected_repository": format!("{}/{}", word(random >> 8), word(random >> 16)),
        "selected_branch": "main",
        "git_provider": "github",
        "title": title(random),
        "trigger": "gui",
        "pr_number": [],
        "llm_model": "anthropic/claude-sonnet-4-5",
        "metrics": {
            "model_name": "default",
            "accumulated_cost": f64::from(u16::try_from(random % 1000).expect("small")) / 100.0,
            "max_budget_per_task": null,
            "accumulated_token_usage": {
                "model": "", "prompt_tokens": tokens, "completion_tokens": tokens / 30, "cache_read_tokens": tokens / 2,
                "cache_write_tokens": tokens / 10, "reasoning_tokens": 0, "context_window": 200_000,
                "per_turn_token": tokens / 40, "response_id": "",
            },
        },
        "parent_conversation_id": parent,
        "public": null,
        "created_at": created_at(number),
        "updated_at": at(NEWEST - i64::try_from(number).expect("an account of this size") * APART + changed),
    }})
}

/// The start task of the conversation with the same number.
pub fn start_task(number: u64) -> Value {
    let random = mix(number);
    json!({"type": "start_task", "data": {
        "id": Uuid::from_u64_pair(mix(number ^ 0xAAAA), number).simple().to_string(),
        "created_by_user_id": null,
        "status": "READY",
        "detail": null,
        "app_conversation_id": conversation_id(number).simple().to_string(),
        "sandbox_id": sandbox_id(number),
        "agent_server_url": "http://127.0.0.1:9",
        "request": {
            "initial_message": {"role": "user", "content": [{"type": "text", "text": title(random)}]},
            "selected_repository": format!("{}/{}", word(random >> 8), word(random >> 16)),
        },
        "created_at": created_at(number),
        "updated_at": created_at(number),
    }})
}

/// A word that occurs in about one title in three.
pub const COMMON: &str = "queue";

/// A word that occurs in about one title in 500.
pub const RARE: &str = "flamingo";

fn title(random: u64) -> String {
    let words: Vec<&str> = (0..6).map(|place| word(mix(random + place))).collect();
    let rare = if random.is_multiple_of(500) { RARE } else { "it" };
    format!("✨ Make {rare} {}", words.join(" "))
}

fn word(random: u64) -> &'static str {
    const WORDS: [&str; 16] = [
        "parser", "retries", "queue", "login", "tests", "faster", "upload", "for", "without", "cache", "client",
        "billing", "the", "readme", "session", "export",
    ];
    WORDS[usize::try_from(random % 16).expect("below 16")]
}

fn at(microseconds: i64) -> String {
    let seconds = microseconds.div_euclid(1_000_000);
    let time = jiff::Timestamp::from_second(seconds).expect("an instant");
    format!("{}.{:06}Z", time.to_string().trim_end_matches('Z'), microseconds.rem_euclid(1_000_000))
}

/// Hashes a number to a pseudo-random one, without collisions (the finalizer of `SplitMix64`).
fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
