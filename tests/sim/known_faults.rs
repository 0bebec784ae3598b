//! Known faults of the product: the patches that put them back still apply, and the seeds that have found one stay green.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::scenario::{Load, conditions, run};
use crate::world::Conditions;

/// A run that has found a fault of the product, which was fixed since.
struct Regression {
    seed: u64,
    starts: u64,
    tenants: u64,
    /// What goes wrong. With everything that usually does, larger runs would be needed.
    inject: fn(&mut Conditions),
    found: &'static str,
}

/// The smallest runs that are known to find each of them.
const REGRESSIONS: [Regression; 3] = [
    Regression {
        seed: 6,
        starts: 3,
        tenants: 1,
        inject: pauses,
        found: "a start whose resume of its sandbox had no lasting effect waited for a minute",
    },
    Regression {
        seed: 3,
        starts: 3,
        tenants: 1,
        inject: calls_without_response,
        found: "a call to S3 without a response blocked a worker until its time limit",
    },
    Regression {
        seed: 4,
        starts: 3,
        tenants: 1,
        inject: late_effects,
        found: "an attempt to append a message took effect after the message was delivered, and appended it again",
    },
];

/// The provider pauses most sandboxes soon after each boot.
fn pauses(conditions: &mut Conditions) {
    conditions.agents.sandbox.pauses = 0.7;
    conditions.pace.trouble = [Duration::ZERO, Duration::from_secs(20)];
}

/// AWS does not respond to some calls.
fn calls_without_response(conditions: &mut Conditions) {
    conditions.aws.hung = 0.03;
}

/// Some calls to AWS take effect when their client has given up.
fn late_effects(conditions: &mut Conditions) {
    conditions.aws.stalled = 0.05;
}

#[test]
fn seeds_that_have_found_a_fault_find_none() {
    for Regression { seed, starts, tenants, inject, found } in REGRESSIONS {
        let mut conditions = conditions(seed, true, 10);
        inject(&mut conditions);
        let within = Duration::from_secs(600);
        let report = run(&conditions, &Load { starts, tenants, within, first_share: None, without_first: false });
        print!("{}", report.text(seed, false));
        assert!(report.violations.is_empty(), "seed {seed}, which has found: {found}");
    }
}

/// `tests/simulation-faults.sh` takes a long time, so that it runs seldom.
#[test]
fn every_patch_applies() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = tests.parent().expect("the root");
    if !root.join(".git").exists() {
        println!("skipped: {} is no git checkout", root.display());
        return;
    }
    if Command::new("git").arg("--version").output().is_err() {
        println!("skipped: there is no git");
        return;
    }
    let folder = std::fs::read_dir(tests.join("sim/faults")).expect("the patches");
    let mut patches: Vec<_> = folder.map(|entry| entry.expect("a file").path()).collect();
    patches.sort();
    assert!(patches.len() >= 15, "{patches:?}");
    for patch in patches {
        let text = std::fs::read_to_string(&patch).expect("a patch");
        let seed = text.lines().next().and_then(|line| line.strip_prefix("seed ")?.split_once(": "));
        let is_complete = seed.is_some_and(|(seed, wrong)| seed.parse::<u64>().is_ok() && wrong.ends_with('.'));
        assert!(is_complete, "{}: its first line is `seed N: what is wrong.`", patch.display());
        let check = Command::new("git").current_dir(root).args(["apply", "--check"]).arg(&patch).output().expect("git");
        assert!(check.status.success(), "{}: {}", patch.display(), String::from_utf8_lossy(&check.stderr));
    }
}
