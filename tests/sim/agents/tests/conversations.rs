//! Conversations, their agents, and what is posted about them.

use shared::agent_server::Failure as AgentFailure;

use super::*;
use crate::agents::faults::{NetworkFaults, SandboxFaults, WebhookFaults};

const ID: Uuid = Uuid::from_u128(42);
const TIMEOUT: Duration = Duration::from_secs(120);

fn texts(world: &World) -> Vec<(String, bool)> {
    let conversations = world.sandboxes.conversations();
    let [one] = &conversations[..] else { panic!("one conversation: {conversations:?}") };
    one.messages.iter().map(|message| (message.text.clone(), message.is_initial)).collect()
}

/// The ids of the events of the only conversation, oldest first, as its agent server shows them.
async fn searched(agent_server: &AgentServer) -> Vec<String> {
    let mut ids = Vec::new();
    let mut page_id: Option<String> = None;
    loop {
        let page = agent_server.newest_events(ID, page_id.as_deref(), 7).await.expect("a page");
        let events = page.items.iter().map(|event| serde_json::from_str::<Value>(event.get()).expect("an event"));
        ids.extend(events.map(|event| event["id"].as_str().expect("an id").to_owned()));
        page_id = page.next_page_id;
        if page_id.is_none() {
            ids.reverse();
            return ids;
        }
    }
}

#[test]
fn a_conversation_is_created_once_and_its_agent_works() {
    simulate(async {
        let world = World::new(settings(1));
        let (_, agent_server) = world.sandbox("one").await;
        assert_eq!(agent_server.whole_conversation(ID, TIMEOUT).await, Ok(None));
        let creation = body(ID, Some("Go"));
        let [one, other] = [(); 2].map(|()| agent_server.create_conversation(&creation, TIMEOUT));
        let (one, other) = tokio::join!(one, other);
        assert_eq!((one.expect("it").id, other.expect("it").id), (ID, ID));
        world.quiet().await;
        let again = agent_server.create_conversation(&creation, TIMEOUT).await.expect("it");
        assert!(again.last_user_message_id.is_some() && again.title.is_some(), "{again:?}");
        assert_eq!(texts(&world), [("Go".to_owned(), true)]);
        let whole = agent_server.whole_conversation(ID, TIMEOUT).await.expect("it").expect("the conversation");
        assert_eq!(whole["execution_status"], "finished");
        assert!(whole["stats"]["usage_to_metrics"]["agent"]["accumulated_cost"].as_f64().expect("a cost") > 0.0);

        agent_server.send_message(ID, "user", &content("More"), true).await.expect("sent");
        world.quiet().await;
        assert_eq!(texts(&world), [("Go".to_owned(), true), ("More".to_owned(), false)]);
        let shown = searched(&agent_server).await;
        let events = world.sandboxes.conversations()[0].events.clone();
        assert_eq!(shown, events.iter().map(|(id, _)| id.clone()).collect::<Vec<_>>());
        let posted: Vec<String> = world.received().events[&ID].iter().map(|(id, _)| id.clone()).collect();
        assert_eq!(posted, shown, "without faults everything is posted in order");
        let responses = events.iter().filter(|(_, json)| json.contains("Response to")).count();
        assert_eq!(responses, 2);

        agent_server.set_title(ID, "Mine", TIMEOUT).await.expect("set");
        agent_server.set_llm_security_analyzer(ID).await.expect("set");
        assert_eq!(agent_server.generate_title(ID, TIMEOUT).await, Ok(None));
        agent_server.delete_conversation(ID, TIMEOUT).await.expect("deleted");
        let gone = agent_server.delete_conversation(ID, TIMEOUT).await.expect_err("it is gone").failure;
        assert!(matches!(gone, AgentFailure::Status(StatusCode::NOT_FOUND, _)));
        world.quiet().await;
        let reported: Vec<Value> =
            world.received().snapshots.iter().map(|snapshot| snapshot["execution_status"].clone()).collect();
        assert!(reported.contains(&json!("deleting")) && reported.contains(&json!("finished")), "{reported:?}");
        assert!(world.sandboxes.conversations()[0].deleted.is_some());
    });
}

#[test]
fn what_was_sent_takes_effect_even_if_the_client_does_not_wait() {
    simulate(async {
        let mut settings = settings(1);
        settings.pace.create = [Duration::from_secs(20), Duration::from_secs(30)];
        let world = World::new(settings);
        let (_, agent_server) = world.sandbox("one").await;
        let late = agent_server.create_conversation(&body(ID, Some("Go")), Duration::from_secs(2)).await;
        assert_eq!(late.expect_err("it takes longer").failure, AgentFailure::TimedOut);
        assert_eq!(agent_server.whole_conversation(ID, TIMEOUT).await, Ok(None), "it does not exist yet");
        sleep(LONG).await;
        assert_eq!(texts(&world), [("Go".to_owned(), true)]);
        // While its agent works, a message waits inside of the agent server, and messages keep their order.
        agent_server.send_message(ID, "user", &content("1"), true).await.expect("sent");
        for text in ["2", "3"] {
            let content = content(text);
            let sent = agent_server.send_message(ID, "user", &content, true);
            drop(tokio::time::timeout(Duration::from_millis(700), sent).await);
        }
        sleep(LONG).await;
        let received: Vec<String> = texts(&world).into_iter().skip(1).map(|(text, _)| text).collect();
        assert_eq!(received, ["1", "2", "3"]);
    });
}

#[test]
fn a_conversation_survives_its_agent_server_and_its_agent_does_not() {
    simulate(async {
        let mut settings = settings(1);
        settings.pace.step = [LONG, LONG];
        let world = World::new(settings);
        let (runtime, agent_server) = world.sandbox("one").await;
        agent_server.create_conversation(&body(ID, Some("Go")), TIMEOUT).await.expect("it");
        sleep(Duration::from_secs(1)).await;
        let status = async || {
            let found = agent_server.conversations(&[ID, Uuid::nil()], TIMEOUT).await.expect("it");
            assert!(found[1].is_none());
            found[0].as_ref().expect("the conversation").execution_status.clone().expect("a status")
        };
        assert_eq!(status().await, "running");
        world.change("pause", &runtime).await.expect("a response");
        world.change("resume", &runtime).await.expect("a response");
        world.alive(&agent_server).await;
        assert_eq!(status().await, "error");
        assert_eq!(texts(&world), [("Go".to_owned(), true)]);
    });
}

/// Three turns of a conversation with these faults of webhooks.
async fn turns(faults: WebhookFaults, product: Product) -> (World, AgentServer) {
    let mut settings = settings(5);
    settings.faults.webhooks = faults;
    let world = World::with(settings, product);
    let (_, agent_server) = world.sandbox("one").await;
    agent_server.create_conversation(&body(ID, Some("Go")), TIMEOUT).await.expect("it");
    for _ in 0..5 {
        world.quiet().await;
        agent_server.send_message(ID, "user", &content("More"), true).await.expect("sent");
    }
    world.quiet().await;
    (world, agent_server)
}

#[test]
fn events_that_are_not_accepted_are_posted_again() {
    simulate(async {
        let product = Product { refusals: 0.4, hangs: 0.1, ..Product::default() };
        let (world, agent_server) = turns(WebhookFaults::default(), product).await;
        let counters = world.sandboxes.counters();
        assert!(counters.posts_refused > 0 && counters.events_lost == 0, "{counters:?}");
        let shown = searched(&agent_server).await;
        let arrived: Vec<(String, u32)> = world.received().events[&ID].clone();
        assert_eq!(arrived, shown.iter().map(|id| (id.clone(), 1)).collect::<Vec<_>>());
        assert_eq!(counters.events_posted, shown.len() as u64);
    });
}

#[test]
fn webhooks_are_lost_doubled_and_late() {
    simulate(async {
        let faults = WebhookFaults { lost: 0.2, ..WebhookFaults::default() };
        let (world, agent_server) = turns(faults, Product::default()).await;
        let counters = world.sandboxes.counters();
        let (shown, arrived) = (searched(&agent_server).await, world.received().events[&ID].len());
        assert!(counters.events_lost > 0, "{counters:?}");
        assert_eq!(shown.len() as u64, arrived as u64 + counters.events_lost, "the search shows what was lost");
    });
    simulate(async {
        let faults = WebhookFaults { doubled: 0.3, ..WebhookFaults::default() };
        let (world, agent_server) = turns(faults, Product::default()).await;
        assert!(world.sandboxes.counters().posts_doubled > 0);
        assert!(world.received().events[&ID].iter().any(|(_, times)| *times == 2));
        let shown = searched(&agent_server).await;
        assert_eq!(world.received().events[&ID].len(), shown.len());
    });
    simulate(async {
        let faults = WebhookFaults { late: 0.3, ..WebhookFaults::default() };
        let (world, agent_server) = turns(faults, Product::default()).await;
        assert!(world.sandboxes.counters().posts_late > 0);
        let arrived: Vec<String> = world.received().events[&ID].iter().map(|(id, _)| id.clone()).collect();
        let shown = searched(&agent_server).await;
        assert!(arrived != shown, "late batches arrive after later ones");
        assert_eq!(arrived.into_iter().collect::<BTreeSet<_>>(), shown.into_iter().collect());
    });
}

#[test]
fn a_crash_loses_the_events_in_memory() {
    simulate(async {
        let mut settings = settings(1);
        settings.pace.trouble = [Duration::from_secs(20), Duration::from_secs(20)];
        settings.faults.sandbox = SandboxFaults { crashes: 1.0, ..SandboxFaults::default() };
        // The product does not respond, so that events wait.
        let world = World::with(settings, Product { refusals: 1.0, ..Product::default() });
        let (_, agent_server) = world.sandbox("one").await;
        agent_server.create_conversation(&body(ID, Some("Go")), TIMEOUT).await.expect("it");
        sleep(LONG).await;
        assert!(lives(&world).contains(&Life::Crashed));
        assert!(world.sandboxes.counters().events_lost > 0);
    });
}

#[test]
fn skills_and_hooks_are_returned() {
    simulate(async {
        let mut settings = settings(1);
        // Requests that may be repeated are repeated by the client.
        settings.faults.network = NetworkFaults { cuts_after: 0.3, ..NetworkFaults::default() };
        let world = World::new(settings);
        let (_, agent_server) = world.sandbox("one").await;
        let skills = agent_server.skills(&shared::agent_server::SkillsQuery::default()).await;
        assert_eq!(
            skills.map(|skills| skills.len()),
            Ok(1).map_err(|_: shared::agent_server::AgentServerError| unreachable!())
        );
        assert_eq!(agent_server.hooks("/workspace/project").await, Ok(None));
        agent_server.upload("/workspace/file", &"content".into()).await.ok();
    });
}
