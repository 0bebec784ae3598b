//! The provider: the life of sandboxes, and its faults.

use shared::agent_server::Failure as AgentFailure;

use super::*;
use crate::agents::faults::{NetworkFaults, ProviderFaults, SandboxFaults};

const SECOND: Duration = Duration::from_secs(1);

async fn shown(world: &World, session: &str) -> Value {
    let (status, runtime) =
        world.provider(Method::GET, &format!("/sessions/{session}"), json!(null)).await.expect("it");
    if status == 200 { runtime } else { json!({"status": status}) }
}

#[test]
fn a_sandbox_boots_pauses_resumes_and_stops() {
    simulate(async {
        let world = World::new(settings(1));
        let (status, runtime) = world.start("one").await.expect("a response");
        assert_eq!((status, &runtime["status"]), (200, &json!("starting")));
        let agent_server = world.agent_server(&runtime);
        assert!(!agent_server.is_alive().await);
        world.alive(&agent_server).await;
        let running = shown(&world, "one").await;
        let mut expected = runtime.clone();
        expected["status"] = json!("running");
        assert_eq!(running, expected);
        let batch = world.provider(Method::GET, "/sessions/batch?ids=none&ids=one", json!(null)).await;
        assert_eq!(batch, Ok((200, json!([null, running]))));
        assert_eq!(agent_server.version().await.expect("it").expect("a version").to_string(), VERSION);
        let stranger = AgentServer::new(world.http.clone(), runtime["url"].as_str().expect("a URL"), Some("no".into()));
        let refused = stranger.hooks("/").await.expect_err("the key is wrong").failure;
        assert!(matches!(refused, AgentFailure::Status(StatusCode::UNAUTHORIZED, _)), "{refused:?}");

        sleep(100 * SECOND).await;
        assert!(agent_server.uptime().await.expect("it").expect("a time") >= 100 * SECOND);
        assert!(agent_server.idle_time().await.expect("it").expect("a time") >= 100 * SECOND);
        assert_eq!(world.change("pause", &runtime).await.expect("it").0, 200);
        assert!(!agent_server.is_alive().await);
        assert_eq!(shown(&world, "one").await["status"], "paused");
        assert_eq!(world.change("resume", &runtime).await.expect("it").0, 200);
        assert_eq!(shown(&world, "one").await["status"], "starting");
        world.alive(&agent_server).await;
        assert!(agent_server.uptime().await.expect("it").expect("a time") < 100 * SECOND, "it has started again");
        // A start of a session that runs has no effect.
        assert_eq!(world.start("one").await.expect("it").1["runtime_id"], runtime["runtime_id"]);
        assert_eq!(world.change("stop", &runtime).await.expect("it").0, 200);
        assert!(!agent_server.is_alive().await);
        assert!([json!("stopped"), json!(404)].contains(&shown(&world, "one").await["status"]));
        assert_eq!(world.change("resume", &runtime).await.expect("it").0, 404);
        let listed = world.provider(Method::GET, "/list", json!(null)).await;
        assert_eq!(listed, Ok((200, json!({"runtimes": []}))));
        let [one] = &world.sandboxes.history()[..] else { panic!("one sandbox") };
        let life: Vec<Life> = one.life.iter().map(|(_, what)| *what).collect();
        let expected = [
            Life::Created,
            Life::Running,
            Life::Alive,
            Life::Paused,
            Life::Resumed,
            Life::Running,
            Life::Alive,
            Life::Stopped,
        ];
        assert_eq!(life, expected);
        assert_eq!(world.sandboxes.calls()["POST /start"], 2);
    });
}

#[test]
fn the_provider_has_a_cap_and_an_api_key() {
    simulate(async {
        let world = World::new(Settings { cap: Some(1), ..settings(1) });
        let (_, one) = world.start("one").await.expect("a response");
        assert_eq!(world.start("two").await.expect("a response").0, 429);
        world.change("pause", &one).await.expect("a response");
        let (status, two) = world.start("two").await.expect("a response");
        assert_eq!(status, 200);
        assert_eq!(world.change("resume", &one).await.expect("a response").0, 429);
        world.change("stop", &two).await.expect("a response");
        assert_eq!(world.change("resume", &one).await.expect("a response").0, 200);
        let request = world.http.request(Method::GET, &format!("{PROVIDER_URL}/list")).expect("a request");
        assert_eq!(request.send(SECOND, |_| 100).await.expect("a response").status, StatusCode::UNAUTHORIZED);
    });
}

#[test]
fn each_fault_of_the_provider_happens() {
    let only = ProviderFaults::default;
    // The result of a creation, and the number of sandboxes right after it and two minutes later.
    for (name, faults, expected, sandboxes) in [
        ("throttles", ProviderFaults { throttles: 1.0, ..only() }, Ok(429), [0, 0]),
        ("errors", ProviderFaults { errors: 1.0, ..only() }, Ok(500), [0, 0]),
        ("errors_after", ProviderFaults { errors_after: 1.0, ..only() }, Ok(500), [1, 1]),
        ("late", ProviderFaults { late: 1.0, ..only() }, Ok(504), [0, 1]),
        ("cuts", ProviderFaults { cuts: 1.0, ..only() }, Err(Cause::CutOff), [1, 1]),
        ("refusals", ProviderFaults { refusals: 1.0, ..only() }, Err(Cause::Unreachable), [0, 0]),
        ("hangs", ProviderFaults { hangs: 1.0, ..only() }, Err(Cause::TimedOut), [0, 0]),
        ("doubles", ProviderFaults { doubles: 1.0, ..only() }, Ok(200), [2, 2]),
    ] {
        simulate(async {
            let mut settings = settings(1);
            settings.faults.provider = faults;
            let world = World::new(settings);
            let started = world.start("one").await.map(|(status, _)| status);
            assert_eq!(started, expected, "{name}");
            let count = world.sandboxes.history().len();
            sleep(LONG).await;
            assert_eq!([count, world.sandboxes.history().len()], sandboxes, "{name}");
            let counters = world.sandboxes.counters();
            assert_eq!(counters.provider_faults, u64::from(name != "doubles"), "{name}");
            assert_eq!(counters.late_effects, u64::from(name == "late"), "{name}");
            world.sandboxes.heal();
            assert_eq!(world.start("one").await.expect("a response").0, 200, "{name}");
        });
    }
}

#[test]
fn a_throttled_provider_says_when_it_may_be_called_again() {
    simulate(async {
        let mut settings = settings(1);
        settings.faults.provider = ProviderFaults { throttled_minutes: 1.0, ..ProviderFaults::default() };
        let world = World::new(settings);
        let send = async || {
            let request = world.http.request(Method::GET, &format!("{PROVIDER_URL}/list")).expect("a request");
            let request = request.with(|request| request.header("X-API-Key", API_KEY));
            request.send(10 * SECOND, |_| 100).await.expect("a response")
        };
        for _ in 0..60 {
            let response = send().await;
            if response.status == StatusCode::TOO_MANY_REQUESTS {
                let seconds = response.headers["retry-after"].to_str().expect("text").parse().expect("seconds");
                assert!((1..=21).contains(&seconds), "{seconds}");
                sleep(Duration::from_secs(seconds)).await;
                assert_eq!(send().await.status, StatusCode::OK);
                return;
            }
            sleep(SECOND).await;
        }
        panic!("it is never throttled");
    });
}

#[test]
fn an_outage_begins_and_ends() {
    simulate(async {
        let mut settings = settings(1);
        settings.faults.provider = ProviderFaults { outages: 1.0, ..ProviderFaults::default() };
        let world = World::new(settings);
        let mut seen = Vec::new();
        for _ in 0..600 {
            let (status, _) = world.provider(Method::GET, "/list", json!(null)).await.expect("a response");
            if seen.last() != Some(&status) {
                seen.push(status);
            }
            sleep(SECOND).await;
        }
        assert!(seen.windows(3).any(|three| three == [200, 503, 200]), "{seen:?}");
    });
}

#[test]
fn both_runtimes_of_a_doubled_creation_can_be_stopped() {
    simulate(async {
        let mut settings = settings(1);
        settings.faults.provider = ProviderFaults { doubles: 1.0, ..ProviderFaults::default() };
        let world = World::new(settings);
        world.start("one").await.expect("a response");
        let first = shown(&world, "one").await;
        world.change("stop", &first).await.expect("a response");
        let second = shown(&world, "one").await;
        assert_ne!(first["runtime_id"], second["runtime_id"]);
        world.change("stop", &second).await.expect("a response");
        assert!(world.sandboxes.history().iter().all(|sandbox| sandbox.status == "stopped"));
        assert!([json!("stopped"), json!(404)].contains(&shown(&world, "one").await["status"]));
    });
}

#[test]
fn each_fault_of_a_sandbox_happens() {
    let only = SandboxFaults::default;
    for (faults, what, status) in [
        (SandboxFaults { boot_failures: 1.0, ..only() }, Life::Failed, "error"),
        (SandboxFaults { pauses: 1.0, ..only() }, Life::PausedByProvider, "paused"),
        (SandboxFaults { evictions: 1.0, ..only() }, Life::Evicted, "stopped"),
        (SandboxFaults { crashes: 1.0, ..only() }, Life::Crashed, "running"),
        (SandboxFaults { restarts: 1.0, ..only() }, Life::Restarted, "running"),
    ] {
        simulate(async {
            let mut settings = settings(1);
            settings.faults.sandbox = faults;
            let world = World::new(settings);
            world.start("one").await.expect("a response");
            sleep(Duration::from_secs(2000)).await;
            let [one] = &world.sandboxes.history()[..] else { panic!("one sandbox") };
            assert!(one.life.iter().any(|(_, lived)| *lived == what), "{what:?}: {:?}", one.life);
            assert_eq!(one.status, status, "{what:?}");
            let counters = world.sandboxes.counters();
            let counted = [counters.failed_boots, counters.pauses_by_provider, counters.evictions, counters.restarts];
            assert_eq!(counted.iter().sum::<u64>(), 1, "{what:?}: {counters:?}");
        });
    }
}

#[test]
fn each_fault_of_the_network_happens_and_passes() {
    let only = NetworkFaults::default;
    for (name, faults, expected, arrives) in [
        ("refusals", NetworkFaults { refusals: 1.0, ..only() }, AgentFailure::Unreachable, false),
        ("unavailable", NetworkFaults { unavailable: 1.0, ..only() }, status(503), false),
        ("errors", NetworkFaults { errors: 1.0, ..only() }, status(500), false),
        ("errors_after", NetworkFaults { errors_after: 1.0, ..only() }, status(500), true),
        ("cuts_before", NetworkFaults { cuts_before: 1.0, ..only() }, AgentFailure::CutOff, false),
        ("cuts_after", NetworkFaults { cuts_after: 1.0, ..only() }, AgentFailure::CutOff, true),
        ("hangs_before", NetworkFaults { hangs_before: 1.0, ..only() }, AgentFailure::TimedOut, false),
        ("hangs_after", NetworkFaults { hangs_after: 1.0, ..only() }, AgentFailure::TimedOut, true),
    ] {
        simulate(async {
            let mut settings = settings(1);
            settings.faults.network = faults;
            let world = World::new(settings);
            let (_, agent_server) = world.sandbox("one").await;
            // Those of the first minutes have met `/alive`.
            sleep(Duration::from_secs(1000)).await;
            let failing = if expected == status(500) { 2 } else { 3 };
            for attempt in 1..=4 {
                let is_last = attempt > failing;
                let path = format!("/workspace/{attempt}");
                let uploaded = agent_server.upload(&path, &"content".into()).await;
                assert_eq!(
                    uploaded.map_err(|error| error.failure),
                    if is_last { Ok(()) } else { Err(expected.clone()) }
                );
                let files = &world.sandboxes.history()[0].files;
                assert_eq!(files.contains(&path), arrives || is_last, "{name} {attempt}");
            }
        });
    }
}

fn status(code: u16) -> AgentFailure {
    AgentFailure::Status(StatusCode::from_u16(code).expect("a status"), "an injected fault".to_owned())
}
