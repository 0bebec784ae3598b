//! Git hosting services.

use crate::http::pydantic::validation::wire_enum;

wire_enum! {
    /// A git hosting service.
    pub enum ProviderType {
        /// GitHub.
        Github = "github",
        /// GitLab.
        Gitlab = "gitlab",
        /// Bitbucket Cloud.
        Bitbucket = "bitbucket",
        /// Bitbucket Data Center.
        BitbucketDataCenter = "bitbucket_data_center",
        /// Forgejo.
        Forgejo = "forgejo",
        /// Azure DevOps.
        AzureDevops = "azure_devops",
        /// Single sign-on of an enterprise.
        EnterpriseSso = "enterprise_sso",
    }
}
