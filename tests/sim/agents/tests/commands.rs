//! Commands: what starts send, and what happens to it in a sandbox.

use shared::agent_server::CommandOutput;
use shared::shell::quoted;

use super::*;
use crate::agents::faults::{CommandFaults, SandboxFaults};
use crate::agents::scripts::{Kind, Script, recognise};

const FUNCTIONS: &str = include_str!("../../../../shared/src/start/saga/command.sh");
const SUPERVISOR: &str = include_str!("../../../../shared/src/start/saga/command_supervisor.sh");
const COPY: &str = include_str!("../../../../shared/src/start/saga/command_copy.sh");
const RUN_SCRIPT: &str = include_str!("../../../../shared/src/start/saga/run_script.sh");
const PREPARE: &str = include_str!("../../../../shared/src/start/saga/prepare_repository.sh");
const REPORT_SCRIPTS: &str = include_str!("../../../../shared/src/start/saga/report_scripts.sh");

const TASK: Uuid = Uuid::from_u128(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef);
const SETUP: &str = "setup-script";

/// A copy of a command of [`TASK`], as the saga sends it.
struct Copy {
    name: &'static str,
    script: String,
    finally: &'static str,
    limit: u64,
    token: &'static str,
}

impl Copy {
    fn setup() -> Self {
        let script = format!(
            "{RUN_SCRIPT}cd '/workspace/project' || exit 1\nif [ -f .openhands/setup.sh ]; then run_script .openhands/setup.sh; fi\n"
        );
        Self { name: SETUP, script, finally: "", limit: 600, token: "token-1" }
    }

    fn preparation(urls: &str) -> Self {
        let variables = [
            ("state", "/workspace/.openhands-start/x"),
            ("working_dir", "/workspace/project"),
            ("project_dir", "/workspace/project"),
            ("credentials", "/workspace/credentials"),
            ("wanted", ""),
            ("workspace", "openhands-workspace-1"),
        ];
        let variables = variables.map(|(name, value)| format!("{name}={}\n", quoted(value))).concat();
        let prepare = match urls {
            "" => String::new(),
            urls => {
                let trap = "trap 'rm -f \"$credentials\"' EXIT\n";
                format!("{trap}is_expected_origin() {{\n  case $1 in '') ;; *) return 1 ;; esac\n}}\nprepare {urls}\n")
            }
        };
        let script = format!(
            "{variables}lock_wait=30\n{PREPARE}set -e\nmkdir -p \"$working_dir\"\ncd \"$working_dir\"\necho \"openhands-browser:$browser\"\n{prepare}{REPORT_SCRIPTS}"
        );
        Self { name: "prepare-repository", script, finally: "rm -f '/workspace/credentials'", limit: 300, token: "" }
    }

    fn text(&self) -> String {
        let task = if self.token.is_empty() { String::new() } else { TASK.simple().to_string() };
        let mut text = String::new();
        for (name, value) in [
            ("d", format!("/workspace/.openhands-start/{}/{}", TASK.simple(), self.name).as_str()),
            ("limit", &self.limit.to_string()),
            ("max_runs", "5"),
            ("output_limit", "16384"),
            ("timed_out", "openhands-timed-out"),
            ("task", &task),
            ("token", self.token),
            ("finally", self.finally),
            ("script", &self.script),
            ("functions", FUNCTIONS),
            ("supervisor", SUPERVISOR),
        ] {
            text += &format!("{name}={}\n", quoted(value));
        }
        text + COPY
    }

    async fn send(&self, agent_server: &AgentServer) -> String {
        let limit = Duration::from_secs(self.limit + 15);
        agent_server.start_command(&self.text(), "/workspace", limit).await.expect("the command starts")
    }
}

/// Waits for the output of a command; `None` if there is none after an hour.
async fn output(agent_server: &AgentServer, id: &str) -> Option<CommandOutput> {
    for _ in 0..3600 {
        if let Ok(Some(output)) = agent_server.command_output(id).await {
            return Some(output);
        }
        sleep(Duration::from_secs(1)).await;
    }
    None
}

fn code(output: Option<&CommandOutput>) -> Option<i64> {
    output.map(|output| output.exit_code)
}

/// A sandbox whose project is prepared; scripts take a minute.
async fn prepared(mut settings: Settings) -> (World, Value, AgentServer) {
    settings.pace.setup = [Duration::from_secs(60), Duration::from_secs(60)];
    let world = World::new(settings);
    let (runtime, agent_server) = world.sandbox("one").await;
    let id = Copy::preparation("").send(&agent_server).await;
    let prepared = output(&agent_server, &id).await.expect("an output");
    assert_eq!(prepared.exit_code, 0);
    let lines: Vec<&str> = prepared.stdout.lines().collect();
    assert!(["openhands-browser:yes", "openhands-browser:no"].contains(&lines[0]), "{prepared:?}");
    assert!(lines.len() == 2 && lines[1].starts_with("openhands-scripts:"), "{prepared:?}");
    (world, runtime, agent_server)
}

fn outcomes(world: &World, name: &str) -> Vec<Option<Outcome>> {
    let runs = world.sandboxes.runs();
    runs.iter().filter(|run| run.name == name).map(|run| run.ended.map(|(_, outcome)| outcome)).collect()
}

#[test]
fn however_many_copies_are_sent_a_script_runs_once() {
    simulate(async {
        let (world, _, agent_server) = prepared(settings(1)).await;
        let copies = [Copy::setup().send(&agent_server).await, Copy::setup().send(&agent_server).await];
        assert_eq!(agent_server.command_output(&copies[0]).await, Ok(None));
        for copy in &copies {
            assert_eq!(code(output(&agent_server, copy).await.as_ref()), Some(0));
        }
        let late = Copy::setup().send(&agent_server).await;
        assert_eq!(code(output(&agent_server, &late).await.as_ref()), Some(0));
        assert_eq!(outcomes(&world, SETUP), [Some(Outcome::Exit(0))]);
        world.quiet().await;
        sleep(LONG).await;
        assert_eq!(world.received().notified, [(TASK.simple().to_string(), "token-1".to_owned())]);
        assert_eq!(world.sandboxes.notifications()[0].status, Some(200));
    });
}

#[test]
fn a_run_survives_its_agent_server_which_forgets_its_commands() {
    for (is_orderly, stored) in [(false, None), (true, Some(-15))] {
        simulate(async {
            let mut settings = settings(1);
            settings.pace.trouble = [Duration::from_secs(30), Duration::from_secs(30)];
            let certain = f64::from(u8::from(is_orderly));
            settings.faults.sandbox =
                SandboxFaults { crashes: 1.0 - certain, restarts: certain, ..SandboxFaults::default() };
            let (world, _, agent_server) = prepared(settings).await;
            let first = Copy::setup().send(&agent_server).await;
            let began = Instant::now();
            while agent_server.uptime().await.is_ok_and(|uptime| uptime >= Some(began.elapsed())) {
                sleep(Duration::from_secs(1)).await;
            }
            world.alive(&agent_server).await;
            assert_eq!(agent_server.command_output(&first).await.expect("it").map(|output| output.exit_code), stored);
            let second = Copy::setup().send(&agent_server).await;
            assert_eq!(code(output(&agent_server, &second).await.as_ref()), Some(0));
            assert_eq!(agent_server.command_output(&first).await.expect("it").map(|output| output.exit_code), stored);
            assert_eq!(outcomes(&world, SETUP), [Some(Outcome::Exit(0))], "one run");
        });
    }
}

#[test]
fn a_run_dies_with_its_sandbox_and_the_next_copy_starts_the_next_run() {
    simulate(async {
        let (world, runtime, agent_server) = prepared(settings(1)).await;
        for _ in 0..5 {
            Copy::setup().send(&agent_server).await;
            sleep(Duration::from_secs(5)).await;
            world.change("pause", &runtime).await.expect("a response");
            world.change("resume", &runtime).await.expect("a response");
            world.alive(&agent_server).await;
        }
        assert_eq!(outcomes(&world, SETUP), [Some(Outcome::Killed); 5]);
        // No sixth run is allowed.
        let last = Copy::setup().send(&agent_server).await;
        assert_eq!(code(output(&agent_server, &last).await.as_ref()), Some(137));
        assert_eq!(outcomes(&world, SETUP).len(), 5);
    });
}

#[test]
fn a_waiting_copy_starts_the_next_run_when_a_supervisor_was_killed() {
    simulate(async {
        let mut settings = settings(1);
        let (world, _, agent_server) = {
            settings.faults.commands = CommandFaults { kills: 1.0, ..CommandFaults::default() };
            settings.pace.setup = [Duration::from_secs(60), Duration::from_secs(60)];
            let world = World::new(settings);
            let (runtime, agent_server) = world.sandbox("one").await;
            (world, runtime, agent_server)
        };
        let copy = Copy::setup().send(&agent_server).await;
        assert_eq!(code(output(&agent_server, &copy).await.as_ref()), Some(137));
        assert_eq!(outcomes(&world, SETUP), [Some(Outcome::Killed); 5]);
    });
}

#[test]
fn a_script_whose_time_is_up_is_ended_and_says_so() {
    simulate(async {
        let mut settings = settings(1);
        settings.faults.commands = CommandFaults { setup_timeouts: 1.0, ..CommandFaults::default() };
        let (world, _, agent_server) = prepared(settings).await;
        let copy = Copy { limit: 50, ..Copy::setup() }.send(&agent_server).await;
        let output = output(&agent_server, &copy).await.expect("an output");
        assert_eq!((output.exit_code, output.stdout.as_str()), (124, "installing\n\nopenhands-timed-out\n"));
        assert_eq!(outcomes(&world, SETUP), [Some(Outcome::TimedOut)]);
    });
}

#[test]
fn a_setup_script_may_fail_and_a_notification_may_be_lost() {
    simulate(async {
        let mut settings = settings(1);
        settings.faults.commands =
            CommandFaults { setup_failures: 1.0, lost_notifications: 1.0, ..CommandFaults::default() };
        let (world, _, agent_server) = prepared(settings).await;
        let copy = Copy::setup().send(&agent_server).await;
        let output = output(&agent_server, &copy).await.expect("an output");
        assert_eq!((output.exit_code, output.stderr.as_str()), (3, "setup.sh: a package is missing\n"));
        sleep(LONG).await;
        assert!(world.sandboxes.notifications().is_empty());
    });
}

#[test]
fn the_agent_server_kills_a_copy_at_its_own_timeout() {
    simulate(async {
        let (world, _, agent_server) = prepared(settings(1)).await;
        let copy = Copy::setup().text();
        let id = agent_server.start_command(&copy, "/workspace", Duration::from_secs(10)).await.expect("it starts");
        assert_eq!(code(output(&agent_server, &id).await.as_ref()), Some(-1));
        assert_eq!(outcomes(&world, SETUP), [None], "the run goes on");
    });
}

#[test]
fn a_clone_may_be_refused_and_needs_its_credentials() {
    simulate(async {
        let mut settings = settings(1);
        settings.faults.commands = CommandFaults { clone_refusals: 1.0, ..CommandFaults::default() };
        let world = World::new(settings);
        let (_, agent_server) = world.sandbox("one").await;
        agent_server.upload("/workspace/credentials", &"https://x:y@host\n".into()).await.expect("uploaded");
        let copy = Copy::preparation("'https://host/o/r.git' 'https://other/o/r.git'").send(&agent_server).await;
        let refused = output(&agent_server, &copy).await.expect("an output");
        assert_eq!((refused.exit_code, refused.stderr.contains("not found")), (1, true));
        assert!(world.sandboxes.runs()[0].is_refused);
        assert!(world.sandboxes.history()[0].files.is_empty(), "the command removes its file");
        let script = Copy::setup().send(&agent_server).await;
        assert_eq!(code(output(&agent_server, &script).await.as_ref()), Some(1), "there is no project");
    });
    simulate(async {
        for (uploads, expected) in [(false, 1), (true, 0)] {
            let world = World::new(settings(1));
            let (_, agent_server) = world.sandbox("one").await;
            if uploads {
                agent_server.upload("/workspace/credentials", &"https://x:y@host\n".into()).await.expect("uploaded");
            }
            let copy = Copy::preparation("'https://host/o/private.git'").send(&agent_server).await;
            assert_eq!(code(output(&agent_server, &copy).await.as_ref()), Some(expected));
        }
    });
}

#[test]
fn the_probe_of_mcp_servers_waits_for_its_file() {
    let loader = "        if time.monotonic() > end:\n            sys.exit(75)\nscope[\"main\"](document)\n";
    let text = format!(
        "f='/workspace/mcp-1.json'\ntrap 'rm -f \"$f\"' EXIT\n  \"$p\" -I -c {} \"$f\" 30 </dev/null\nexit 69\n",
        quoted(loader)
    );
    assert_eq!(
        recognise(&text),
        Script::Probe { file: "/workspace/mcp-1.json".to_owned(), wait: Duration::from_secs(30) }
    );
    simulate(async {
        let mut settings = settings(3);
        settings.faults.commands = CommandFaults { mcp_failures: 0.5, ..CommandFaults::default() };
        let world = World::new(settings);
        let (_, agent_server) = world.sandbox("one").await;
        let send = async || agent_server.start_command(&text, "/", Duration::from_secs(60)).await.expect("it starts");
        let without = send().await;
        assert_eq!(code(output(&agent_server, &without).await.as_ref()), Some(75));
        let with = send().await;
        let document = json!({"limit": 5.0, "keys": ["a", "b", "c", "d", "e", "f"]}).to_string();
        agent_server.upload("/workspace/mcp-1.json", &document.into()).await.expect("uploaded");
        let probed = output(&agent_server, &with).await.expect("an output");
        let lines: Vec<&str> = probed.stdout.lines().collect();
        assert_eq!((probed.exit_code, lines.len()), (0, 6));
        assert!(lines.contains(&r#"openhands-mcp-probe:{"server":"a","works":true}"#), "{lines:?}");
        assert!(lines.iter().any(|line| line.contains(r#""works":false"#)), "{lines:?}");
        assert!(world.sandboxes.history()[0].files.is_empty());
    });
}

#[test]
fn commands_are_recognised_by_their_scripts() {
    assert_eq!(recognise("umask 077; mkdir -p '/workspace/.openhands-start/1'"), Script::MakeFolder);
    let Script::Once(once) = recognise(&Copy::preparation("'https://h/it'\\''s.git' 'https://g/o/r.git'").text())
    else {
        panic!("a copy");
    };
    let Kind::PrepareRepository { urls, credentials, .. } = &once.kind else { panic!("{:?}", once.kind) };
    assert_eq!((urls.len(), urls[0].as_str()), (2, "https://h/it's.git"));
    assert_eq!(once.removes.as_ref(), Some(credentials));
    assert_eq!((once.start, once.token.clone(), once.limit), (TASK, None, Duration::from_secs(300)));
    let hooks = "project_dir='/p'\nmark='m'\nnew_hook='h'\nunset CDPATH\ncd \"$project_dir\" || exit 1\n[ -f .openhands/pre-commit.sh ] || exit 0\nset -e\n";
    let Script::Once(once) = recognise(&Copy { name: "git-hooks", script: hooks.to_owned(), ..Copy::setup() }.text())
    else {
        panic!("a copy");
    };
    assert_eq!(once.kind, Kind::GitHooks { project_dir: "/p".to_owned() });
}

#[test]
#[should_panic(expected = "does not know this command:\nrm -rf /")]
fn an_unknown_command_is_a_panic() {
    recognise("rm -rf /");
}

#[test]
#[should_panic(expected = "the supervisor of a command has changed, and the model has to be changed with it")]
fn a_changed_script_is_a_panic() {
    recognise(&Copy::setup().text().replace("code=timeout", "code=late"));
}
