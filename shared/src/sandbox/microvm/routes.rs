//! The routes of the front door: which MicroVM the function of the CloudFront distribution sends requests for a sandbox to, and with which
//! access token. The function reads them from a CloudFront KeyValueStore.
//!
//! A route is two keys, because a value has at most 1 KB and the token alone nearly as much: `host/<name>` and `token/<name>`. Both are
//! written and deleted by one `UpdateKeys`, which is all or nothing.
//!
//! A write needs the ETag of the whole store, so writes of different sandboxes contend. A write that finds another ETag reads it again.

use std::time::Duration;

use aws_sdk_cloudfrontkeyvaluestore::Client;
use aws_sdk_cloudfrontkeyvaluestore::config::endpoint::{Endpoint, EndpointFuture, Params, ResolveEndpoint};
use aws_sdk_cloudfrontkeyvaluestore::error::{DisplayErrorContext, ProvideErrorMetadata};
use aws_sdk_cloudfrontkeyvaluestore::operation::update_keys::UpdateKeysError;
use aws_sdk_cloudfrontkeyvaluestore::types::{DeleteKeyRequestListItem, PutKeyRequestListItem};
use aws_smithy_types::endpoint::EndpointAuthScheme;
use aws_types::SdkConfig;
use secrecy::{ExposeSecret as _, SecretString};

use crate::aws::timeouts;
use crate::dynamo::Backoff;
use crate::error::{Error, Result};

/// The timeout of one attempt.
const ATTEMPT: Duration = Duration::from_secs(5);
/// How often a write is repeated that another one has overtaken.
const CONTENDED: Backoff =
    Backoff { first: Duration::from_millis(50), longest: Duration::from_millis(800), attempts: 8 };
/// The most routes in one write: AWS permits 50 keys.
const AT_ONCE: usize = 25;

/// The route of a sandbox.
#[derive(Clone, Debug)]
pub(super) struct Route {
    /// The name of the sandbox, which is the first segment of its path.
    pub name: String,
    /// The host name of its MicroVM's endpoint.
    pub host: String,
    /// The access token for the MicroVM.
    pub token: SecretString,
}

/// The routes of a deployment.
#[derive(Clone, Debug)]
pub(super) struct Routes {
    client: Client,
    store: String,
}

/// The outcome of one attempt to write.
enum Written {
    Done,
    /// The store has changed since its ETag was read.
    Overtaken(String),
    /// A key that is to be deleted does not exist.
    Missing,
}

/// Sends all calls to one address. The SDK would put the account's id in front of its host.
#[derive(Clone, Debug)]
struct FixedEndpoint(String);

impl ResolveEndpoint for FixedEndpoint {
    fn resolve_endpoint<'a>(&'a self, _: &'a Params) -> EndpointFuture<'a> {
        let scheme = EndpointAuthScheme::with_capacity("sigv4a", 2)
            .put("signingName", "cloudfront-keyvaluestore")
            .put("signingRegionSet", vec!["*".to_owned().into()]);
        EndpointFuture::ready(Ok(Endpoint::builder().url(self.0.clone()).auth_scheme(scheme).build()))
    }
}

impl Routes {
    /// The routes in the KeyValueStore with this ARN. `endpoint` is the address of a stand-in for the service.
    pub fn new(config: &SdkConfig, store: String, endpoint: Option<&str>) -> Self {
        // Without the endpoint of the other clients, if these have one.
        let mut builder =
            aws_sdk_cloudfrontkeyvaluestore::config::Builder::from(config).timeout_config(timeouts(ATTEMPT));
        builder.set_endpoint_url(None);
        if let Some(url) = endpoint {
            builder = builder.endpoint_resolver(FixedEndpoint(url.to_owned()));
        }
        Self { client: Client::from_conf(builder.build()), store }
    }

    /// Adds routes, and replaces those of the same sandboxes.
    ///
    /// # Errors
    /// [`Error::Upstream`].
    pub async fn open(&self, routes: &[Route]) -> Result<()> {
        for some in routes.chunks(AT_ONCE) {
            let mut puts = Vec::with_capacity(2 * some.len());
            for Route { name, host, token } in some {
                puts.push(put(format!("host/{name}"), host)?);
                puts.push(put(format!("token/{name}"), token.expose_secret())?);
            }
            self.write(puts, Vec::new()).await?;
        }
        Ok(())
    }

    /// Deletes the route of a sandbox, which may not exist.
    ///
    /// # Errors
    /// [`Error::Upstream`].
    pub async fn close(&self, name: &str) -> Result<()> {
        let mut deletes = Vec::with_capacity(2);
        for kind in ["host", "token"] {
            let item = DeleteKeyRequestListItem::builder().key(format!("{kind}/{name}")).build();
            deletes.push(item.map_err(Error::internal)?);
        }
        self.write(Vec::new(), deletes).await
    }

    async fn write(&self, puts: Vec<PutKeyRequestListItem>, deletes: Vec<DeleteKeyRequestListItem>) -> Result<()> {
        let mut attempts = CONTENDED.start();
        let mut last = String::new();
        while attempts.next().await {
            let found = self.client.describe_key_value_store().kvs_arn(&self.store).send().await;
            let etag = found.map_err(|error| failed("DescribeKeyValueStore", &DisplayErrorContext(&error)))?.e_tag;
            match self.write_at(etag, puts.clone(), deletes.clone()).await? {
                Written::Done | Written::Missing => return Ok(()),
                Written::Overtaken(context) => last = context,
            }
        }
        Err(failed("UpdateKeys", &format_args!("other writes have overtaken all attempts: {last}")))
    }

    async fn write_at(
        &self,
        etag: String,
        puts: Vec<PutKeyRequestListItem>,
        deletes: Vec<DeleteKeyRequestListItem>,
    ) -> Result<Written> {
        let is_deletion = puts.is_empty();
        let update = self.client.update_keys().kvs_arn(&self.store).if_match(etag);
        let update = if is_deletion { update.set_deletes(Some(deletes)) } else { update.set_puts(Some(puts)) };
        let Err(error) = update.send().await else { return Ok(Written::Done) };
        let code = error.code().unwrap_or_default();
        let message = error.message().unwrap_or_default().to_ascii_lowercase();
        match error.as_service_error() {
            // The store itself exists, its ETag was read: the keys do not. They are deleted together, so none of them is left.
            Some(UpdateKeysError::ResourceNotFoundException(_)) if is_deletion => Ok(Written::Missing),
            Some(UpdateKeysError::ConflictException(_)) => Ok(Written::Overtaken(code.to_owned())),
            // The documentation has ConflictException for an ETag that is not current; others have seen this one.
            Some(UpdateKeysError::ValidationException(_)) if message.contains("condition") => {
                Ok(Written::Overtaken(code.to_owned()))
            }
            _ => Err(failed("UpdateKeys", &DisplayErrorContext(&error))),
        }
    }
}

fn put(key: String, value: &str) -> Result<PutKeyRequestListItem> {
    PutKeyRequestListItem::builder().key(key).value(value).build().map_err(Error::internal)
}

fn failed(operation: &str, error: &dyn std::fmt::Display) -> Error {
    Error::Upstream {
        message: "CloudFront does not respond about the route of the sandbox; try again later".to_owned(),
        context: format!("CloudFront KeyValueStore: {operation}: {error}"),
    }
}
