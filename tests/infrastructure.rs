//! What is deployed: infra/, azure.yaml and the workflows, held against each other, host.json, the function folders and
//! the settings.
//!
//! These are checks of structure. They cannot prove that a Bicep compiler accepts the files, that types, API versions and
//! names of properties are Azure's, that Azure accepts the values, or that an identity's rights suffice: that takes a
//! deployment (docs/verify-on-azure.md). The Bicep reader below knows one property a line, as `bicep format` writes it,
//! and refuses what it cannot read.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use product_cache::config::{Config, RedisLogin, SETTINGS};
use yaml_rust2::{Yaml, YamlLoader};

/// App settings that are the platform's or the host's; `AzureWebJobsStorage__…` and the SQL trigger's besides.
const PLATFORM: [&str; 7] = [
    "APPLICATIONINSIGHTS_AUTHENTICATION_STRING",
    "APPLICATIONINSIGHTS_CONNECTION_STRING",
    "AzureWebJobs.InvalidateCache.Disabled",
    "FUNCTIONS_EXTENSION_VERSION",
    "FUNCTIONS_WORKER_RUNTIME",
    "WEBSITE_RUN_FROM_PACKAGE",
    "WEBSITE_RUN_FROM_PACKAGE_BLOB_MI_RESOURCE_ID",
];

/// Roles that are assigned: the id Azure has for each.
const BLOB_OWNER: &str = "b7e6dc6d-f1e8-4753-8033-0f276bb0955b";
const BLOB_CONTRIBUTOR: &str = "ba92f5b4-2d11-453d-a403-e96b0029c9fe";
const TABLE_CONTRIBUTOR: &str = "0a9a7e1f-b9d0-4cc4-a60d-0319b160aaa3";
const METRICS_PUBLISHER: &str = "3913510d-42f4-4e42-8a64-420c390055eb";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Every file below a folder of the repository, as paths from its root.
fn files(folder: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root().join(folder)).unwrap_or_else(|error| panic!("{folder}: {error}")) {
        let path = format!("{folder}/{}", entry.unwrap().file_name().into_string().unwrap());
        if root().join(&path).is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// A Bicep file: each property with the way to it (`resource app …/properties/siteConfig/minTlsVersion`).
struct Bicep {
    path: String,
    text: String,
    lines: Vec<(String, String)>,
}

impl Bicep {
    fn read(path: &str) -> Self {
        let (text, mut lines, mut open) = (read(path), Vec::new(), Vec::<String>::new());
        for (number, line) in text.lines().enumerate() {
            let line = code(line).trim();
            let place = format!("{path}:{}", number + 1);
            if line.is_empty() {
                continue;
            }
            if line.starts_with(['}', ']']) {
                assert!(matches!(line, "}" | "]" | "})" | "])"), "{place}: cannot be read: {line}");
                assert!(open.pop().is_some(), "{place}: closes what is not open");
                continue;
            }
            let key = |text: &str| text.split([':', '=']).next().unwrap_or_default().trim().to_owned();
            if line.ends_with(['{', '[']) {
                open.push(key(line));
                continue;
            }
            let (name, value) = match open.is_empty() {
                true => line.split_once(" = ").unwrap_or((line, "")),
                false => line.split_once(": ").unwrap_or(("", line)),
            };
            assert!(
                open.is_empty() || !name.contains('{') || name.contains("${"),
                "{place}: one property a line: {line}"
            );
            open.push(name.trim().to_owned());
            lines.push((open.join("/"), value.trim().to_owned()));
            open.pop();
        }
        assert!(open.is_empty(), "{path}: {open:?} is not closed");
        Self { path: path.to_owned(), text, lines }
    }

    /// Every value at the end of a way: of all its resources, if several have one.
    fn values(&self, way: &str) -> Vec<&str> {
        let end = format!("/{way}");
        self.lines.iter().filter(|(place, _)| place.ends_with(&end)).map(|(_, value)| value.as_str()).collect()
    }

    /// That the one value at the end of a way is this.
    fn has(&self, way: &str, value: &str) {
        assert_eq!(self.values(way), [value], "{}: {way}", self.path);
    }

    /// Declared names of a kind, each with its line's rest.
    fn declared(&self, kind: &str) -> Vec<(&str, &str)> {
        let lines = self.text.lines().filter_map(|line| line.strip_prefix(kind)?.strip_prefix(' '));
        lines.map(|rest| rest.split_once(' ').unwrap_or((rest, ""))).collect()
    }

    /// App settings, where the file names any.
    fn app_settings(&self) -> Vec<(&str, &str)> {
        let mut settings = Vec::new();
        for pair in self.lines.windows(2) {
            if let [(name_way, name), (value_way, value)] = pair
                && name_way.ends_with("/name")
                && value_way.ends_with("/value")
            {
                let name = if name == "triggerOff" { "'AzureWebJobs.InvalidateCache.Disabled'" } else { name };
                settings.push((name.trim_matches('\''), value.as_str()));
            }
        }
        settings
    }
}

/// A line without its comment; `//` in a string is none.
fn code(line: &str) -> &str {
    let mut quoted = false;
    for (at, c) in line.char_indices() {
        match c {
            '\'' => quoted = !quoted,
            '/' if !quoted && line[at..].starts_with("//") => return &line[..at],
            _ => {}
        }
    }
    line
}

fn bicep() -> Vec<Bicep> {
    let files: Vec<_> = files("infra").into_iter().filter(|path| path.ends_with(".bicep")).collect();
    assert!(files.len() > 5, "{files:?}");
    files.iter().map(|path| Bicep::read(path)).collect()
}

fn module(name: &str) -> Bicep {
    Bicep::read(&format!("infra/modules/{name}.bicep"))
}

fn yaml(path: &str) -> Yaml {
    let mut documents = YamlLoader::load_from_str(&read(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    assert_eq!(documents.len(), 1, "{path}");
    documents.remove(0)
}

fn workflows() -> Vec<String> {
    files(".github/workflows")
}

/// Function folders: name and type of the trigger.
fn functions() -> Vec<(String, String)> {
    let folders = fs::read_dir(root()).unwrap().map(|entry| entry.unwrap().path());
    let functions = folders.filter(|folder| folder.join("function.json").exists());
    functions
        .map(|folder| {
            let text = fs::read_to_string(folder.join("function.json")).unwrap();
            let function: serde_json::Value = serde_json::from_str(&text).unwrap();
            let kind = function["bindings"][0]["type"].as_str().unwrap().to_owned();
            (folder.file_name().unwrap().to_str().unwrap().to_owned(), kind)
        })
        .collect()
}

#[test]
fn every_parameter_and_output_says_what_it_is_and_every_parameter_is_used() {
    for file in bicep() {
        let lines: Vec<_> = file.text.lines().collect();
        for (at, line) in lines.iter().enumerate() {
            if ["param ", "output "].iter().any(|kind| line.starts_with(kind)) {
                // Decorators stand in lines of their own right above, up to an empty line.
                let above = lines[..at].iter().rev().take_while(|line| !line.is_empty());
                assert!(above.into_iter().any(|line| line.starts_with("@description('")), "{}: {line}", file.path);
            }
        }
        for (name, _) in file.declared("param") {
            let words = file.text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| *word == name);
            assert!(words.count() > 1, "{}: {name} is not used", file.path);
        }
    }
}

#[test]
fn modules_exist_and_are_given_what_they_ask_for() {
    let mut used = BTreeSet::new();
    for file in bicep() {
        for (name, rest) in file.declared("module") {
            let target = rest.split('\'').nth(1).unwrap_or_else(|| panic!("{}: {name}", file.path));
            let folder = Path::new(&file.path).parent().unwrap();
            let path = folder.join(target).to_str().unwrap().to_owned();
            let callee = Bicep::read(&path);
            used.insert(path);
            let start = format!("module {name} ");
            let given: BTreeSet<_> = file
                .lines
                .iter()
                .filter(|(way, _)| way.starts_with(&start))
                .filter_map(|(way, _)| way.split_once("/params/"))
                .map(|(_, rest)| rest.split('/').next().unwrap())
                .collect();
            let declared: BTreeSet<_> = callee.declared("param").into_iter().map(|(name, _)| name).collect();
            assert_eq!(given, declared, "{}: module {name}", file.path);

            // What is taken from it is one of its outputs.
            let outputs: BTreeSet<_> = callee.declared("output").into_iter().map(|(name, _)| name).collect();
            for call in [format!("{name}.outputs."), format!("{name}!.outputs.")] {
                for (at, _) in file.text.match_indices(&call) {
                    if file.text[..at].ends_with(|c: char| c.is_alphanumeric()) {
                        continue; // the end of a longer name
                    }
                    let rest = &file.text[at + call.len()..];
                    let output = rest.split(|c: char| !c.is_alphanumeric()).next().unwrap();
                    assert!(outputs.contains(output), "{}: {call}{output}", file.path);
                }
            }
        }
    }
    let modules: BTreeSet<_> = files("infra/modules").into_iter().collect();
    assert_eq!(used, modules, "every module is used");
}

#[test]
fn the_parameter_file_gives_what_main_asks_for() {
    let file: serde_json::Value = serde_json::from_str(&read("infra/main.parameters.json")).unwrap();
    let given: BTreeSet<_> = file["parameters"].as_object().unwrap().keys().map(String::as_str).collect();
    let main = Bicep::read("infra/main.bicep");
    for (name, rest) in main.declared("param") {
        assert!(given.contains(name) || rest.contains('='), "{name} has neither a value nor a default");
    }
    let declared: BTreeSet<_> = main.declared("param").into_iter().map(|(name, _)| name).collect();
    assert!(given.is_subset(&declared), "{given:?}");
}

#[test]
fn every_app_setting_is_the_handlers_or_the_platforms() {
    let known = |name: &str| {
        SETTINGS.iter().any(|setting| setting.name == name)
            || PLATFORM.contains(&name)
            || name.starts_with("AzureWebJobsStorage__")
    };
    let mut names = BTreeSet::new();
    for file in bicep() {
        for (name, _) in file.app_settings() {
            assert!(known(name), "{}: {name} is no setting", file.path);
            names.insert(name.to_owned());
        }
    }
    for name in ["Sql", "Redis", "REDIS_ENTRA_ID", "REDIS_MAX_CLIENTS", "MAX_INSTANCES"] {
        assert!(names.contains(name), "{name}: {names:?}");
    }
    for name in PLATFORM.into_iter().chain(["AzureWebJobsStorage__accountName", "AzureWebJobsStorage__clientId"]) {
        assert!(names.contains(name), "{name}: {names:?}");
    }
    // The trigger's own connection is one of them.
    let trigger: serde_json::Value = serde_json::from_str(&read("InvalidateCache/function.json")).unwrap();
    assert!(names.contains(trigger["bindings"][0]["connectionStringSetting"].as_str().unwrap()));
    // Flex Consumption says these in functionAppConfig and refuses them as settings.
    for file in [Bicep::read("infra/main.bicep"), module("app-flex")] {
        for (name, _) in file.app_settings() {
            assert!(!name.starts_with("FUNCTIONS_") && !name.starts_with("WEBSITE_"), "{}: {name}", file.path);
        }
    }
}

#[test]
fn the_handler_understands_the_settings_it_is_given() {
    const CLIENT_ID: &str = "0f8fad5b-d9cb-469f-a165-70867728950e";
    let main = Bicep::read("infra/main.bicep");
    let mut variables = BTreeMap::new();
    for (name, value) in main.app_settings() {
        let value = value.trim_matches('\'');
        let value = value.strip_prefix("string(").and_then(|value| value.strip_suffix(')')).map_or_else(
            || {
                value
                    .replace("${database.outputs.host}", "shop.database.windows.net")
                    .replace("${database.outputs.name}", "shop")
                    .replace("${redis.outputs.host}", "shop.westeurope.redis.azure.net")
                    .replace("${redis.outputs.port}", "10000")
                    .replace("${identity.outputs.clientId}", CLIENT_ID)
                    .replace("identity.outputs.clientId", CLIENT_ID)
            },
            |parameter| {
                // Bounded by the plan, which the default is not.
                let parameter = match parameter {
                    "mostInstances" => "maximumInstanceCount",
                    "databaseConnections" => return connections(2, 40).to_string(),
                    parameter => parameter,
                };
                let declared = main.declared("param").into_iter().find(|(name, _)| *name == parameter);
                declared.unwrap().1.rsplit(' ').next().unwrap().to_owned() // its default
            },
        );
        if SETTINGS.iter().any(|setting| setting.name == name) {
            assert!(!value.contains("${"), "{name}: {value}");
            variables.insert(name.to_owned(), value);
        }
    }
    // What the platform adds for an app that has an identity.
    for (name, value) in [("IDENTITY_ENDPOINT", "http://127.0.0.1:8081/msi/token"), ("IDENTITY_HEADER", "0")] {
        variables.insert(name.to_owned(), value.to_owned());
    }
    let config = Config::from_variables(&variables).unwrap_or_else(|mistakes| panic!("{mistakes}"));
    let server = config.database.source.server().expect("a server");
    assert_eq!((server.host.as_str(), server.port), ("shop.database.windows.net", 1433));
    assert!(format!("{:?}", server.login).contains(CLIENT_ID), "{:?}", server.login);
    assert!(format!("{:?}", server.tls).starts_with("Verified"), "{:?}", server.tls);

    let redis = config.redis.expect("Redis").server;
    assert_eq!(redis.nodes[0].to_string(), "shop.westeurope.redis.azure.net:10000");
    assert!(redis.encrypted, "TLS");
    let RedisLogin::ManagedIdentity { client_id, .. } = redis.login else { panic!("{:?}", redis.login) };
    assert_eq!(client_id.as_deref(), Some(CLIENT_ID));
}

#[test]
fn the_handler_is_told_as_many_instances_as_the_plan_starts() {
    let main = Bicep::read("infra/main.bicep");
    let told = main.app_settings().into_iter().find(|(name, _)| *name == "MAX_INSTANCES");
    assert_eq!(told.map(|(_, value)| value), Some("string(mostInstances)"));
    let text = read("infra/main.bicep");
    // An Elastic Premium plan ends at a hundred, Flex Consumption at the parameter's own bound.
    assert!(text.contains("mostInstances = plan == 'premium' ? min(maximumInstanceCount, 100) : maximumInstanceCount"));
    assert_eq!(text.matches("maximumInstanceCount: mostInstances").count(), 2, "the bound of either plan");
    for (module, bound) in [("app-flex", "maximumInstanceCount"), ("app-premium", "maximumElasticWorkerCount")] {
        assert!(read(&format!("infra/modules/{module}.bicep")).contains(&format!("{bound}: maximumInstanceCount")));
    }
}

/// What main.bicep gives an instance, by its own formula, which the test below compares.
fn connections(vcores: u64, instances: u64) -> u64 {
    (75 * vcores * 4 / 5 / instances).clamp(1, 8)
}

#[test]
fn all_instances_connections_stay_within_the_databases_workers() {
    let (main, text) = (Bicep::read("infra/main.bicep"), read("infra/main.bicep"));
    assert!(text.contains("var databaseWorkers = 75 * databaseVCores"));
    assert!(text.contains("databaseConnections = max(1, min(8, databaseWorkers * 4 / 5 / mostInstances))"));
    let told = main.app_settings().into_iter().find(|(name, _)| *name == "DATABASE_MAX_CONNECTIONS");
    assert_eq!(told.map(|(_, value)| value), Some("string(databaseConnections)"));
    let default = |parameter: &str| -> u64 {
        let declared = main.declared("param").into_iter().find(|(name, _)| *name == parameter);
        declared.unwrap().1.rsplit(' ').next().unwrap().parse().unwrap()
    };
    let (vcores, instances) = (default("databaseVCores"), default("maximumInstanceCount"));
    assert_eq!((vcores, instances), (2, 40), "docs/operations.md reckons with these");
    assert!(connections(vcores, instances) > 1 && connections(vcores, instances) * instances <= 75 * vcores);

    module("database").has("sku/capacity", "vCores");
    main.has("params/vCores", "databaseVCores");
    assert!(read("infra/main.parameters.json").contains(&format!("${{SQL_VCORES={vcores}}}")));
}

#[test]
fn the_alerts_ask_for_what_the_runbook_tells_and_are_made_for_whom_there_is_to_tell() {
    let (alerts, main, runbook) = (module("alerts"), read("infra/main.bicep"), read("docs/operations.md"));
    let queries: Vec<_> = alerts.lines.iter().filter(|(way, _)| way.ends_with("/query")).collect();
    assert_eq!(queries.len(), 2);
    for (_, query) in queries {
        for text in query.split('"').skip(1).step_by(2) {
            assert!(runbook.contains(text), "docs/operations.md does not tell of {text}");
        }
    }
    let signals: Vec<_> = runbook.lines().skip_while(|line| !line.starts_with("| Signal")).skip(2).take(3).collect();
    assert!(signals[0].contains("500 and above") && signals[1].contains("restart retry count"), "{signals:?}");
    assert!(signals[2].contains("`SQLite`"), "the first three are alerts: {signals:?}");
    assert!(main.contains("module alerts 'modules/alerts.bicep' = if (!empty(alertActionGroupId)) {"));
}

#[test]
fn nobody_deploys_with_a_password() {
    for (module, sites) in [(module("app-flex"), 1), (module("app-premium"), 2)] {
        for name in ["'scm'", "'ftp'"] {
            let policies = module.lines.iter().filter(|(way, value)| {
                way.contains("/basicPublishingCredentialsPolicies@") && way.ends_with("/name") && value == name
            });
            assert_eq!(policies.count(), sites, "{}: {name}", module.path);
        }
        assert_eq!(module.values("properties/allow"), vec!["false"; 2 * sites], "{}", module.path);
    }
}

#[test]
fn nothing_that_is_deployed_holds_or_asks_for_a_secret() {
    let traces = [
        "listkeys",
        "listsecrets",
        "listcredentials",
        "listconnectionstrings",
        "listaccountsas",
        "listservicesas",
        "@secure",
        "getsecret",
        "password",
        "pwd=",
        "accountkey",
        "sharedaccess",
        "primarykey",
        "secondarykey",
        "administratorlogin:",
        "secrets.",
    ];
    let own = ["azure.yaml".to_owned(), ".github/workflows/deploy.yml".to_owned()];
    for path in files("infra").into_iter().chain(own) {
        let text = read(&path).to_lowercase();
        for trace in traces {
            assert!(!text.contains(trace), "{path}: {trace}");
        }
    }
    for path in workflows() {
        assert!(!read(&path).contains("secrets."), "{path}: a stored credential");
    }
}

#[test]
fn storage_database_and_redis_know_identities_only() {
    let storage = module("storage");
    storage.has("properties/allowSharedKeyAccess", "false");
    storage.has("properties/allowBlobPublicAccess", "false");
    storage.has("properties/publicAccess", "'None'");
    storage.has("properties/supportsHttpsTrafficOnly", "true");

    let database = module("database");
    database.has("administrators/azureADOnlyAuthentication", "true");
    database.has("administrators/administratorType", "'ActiveDirectory'");
    database.has("properties/minimalTlsVersion", "'1.2'");

    let redis = module("redis");
    redis.has("properties/accessKeysAuthentication", "'Disabled'");
    redis.has("properties/clientProtocol", "'Encrypted'");
    redis.has("properties/clusteringPolicy", "'EnterpriseCluster'");
    redis.has("properties/port", "10000");
    redis.has("properties/minimumTlsVersion", "'1.2'");

    let monitoring = module("monitoring");
    monitoring.has("properties/DisableLocalAuth", "true");
    monitoring.has("properties/features/disableLocalAuth", "true");

    for app in [module("app-flex"), module("app-premium")] {
        assert!(!app.values("properties/httpsOnly").is_empty(), "{}", app.path);
        assert!(app.values("properties/httpsOnly").iter().all(|value| *value == "true"), "{}", app.path);
    }
    // On the private network, none of the three has a public door.
    for file in [storage, database, redis] {
        file.has("properties/publicNetworkAccess", "privateNetwork ? 'Disabled' : 'Enabled'");
        assert_eq!(file.declared("module").len(), 1, "{}: a private endpoint", file.path);
    }
}

#[test]
fn the_apps_identity_has_the_rights_it_needs_and_no_others() {
    let storage = module("storage");
    assert!(storage.text.contains(&format!("var hostRoles = [\n  '{BLOB_OWNER}'\n  '{TABLE_CONTRIBUTOR}'\n]")));
    assert!(storage.text.contains(&format!("var uploader = '{BLOB_CONTRIBUTOR}'")));
    assert_eq!(storage.values("properties/principalId"), ["principalId", "uploaderId"]);

    let monitoring = module("monitoring");
    assert!(monitoring.text.contains(&format!("var publisher = '{METRICS_PUBLISHER}'")));
    monitoring.has("properties/principalId", "principalId");

    let redis = module("redis");
    redis.has("properties/user/objectId", "principalId");
    redis.has("properties/accessPolicyName", "'default'");

    // Each of them is given the same identity, by its object id.
    let main = Bicep::read("infra/main.bicep");
    assert_eq!(main.values("params/principalId"), ["identity.outputs.principalId"; 3]);
    assert_eq!(main.values("params/identityId"), ["identity.outputs.id"; 2]);
    let assignments: usize = bicep().iter().map(|file| file.text.matches("roleAssignments@").count()).sum();
    assert_eq!(assignments, 3, "a new one belongs into this test");
}

#[test]
fn flex_consumption_runs_the_handler_and_keeps_an_instance_for_each_trigger() {
    let flex = module("app-flex");
    flex.has("functionAppConfig/runtime/name", "'custom'");
    flex.has("functionAppConfig/runtime/version", "'1.0'");
    flex.has("deployment/storage/authentication/type", "'UserAssignedIdentity'");
    flex.has("deployment/storage/authentication/userAssignedIdentityResourceId", "identityId");
    let sku = flex.values("sku/name");
    assert_eq!(sku, ["'FC1'"]);

    // All HTTP triggers scale together; any other function does by itself, and the scale controller cannot wake it.
    let functions = functions();
    let expected: BTreeSet<_> = functions
        .iter()
        .map(|(name, kind)| if kind == "httpTrigger" { "'http'".to_owned() } else { format!("'function:{name}'") })
        .collect();
    assert_eq!(expected.len(), 2, "{functions:?}");
    let ready =
        |way| flex.lines.iter().filter(move |(place, _)| place.contains("/alwaysReady/") && place.ends_with(way));
    assert_eq!(ready("/name").map(|(_, name)| name.clone()).collect::<BTreeSet<_>>(), expected);
    assert!(ready("/instanceCount").all(|(_, count)| count.parse::<u32>().is_ok_and(|count| count > 0)));
    assert_eq!(ready("/instanceCount").count(), expected.len());

    let premium = module("app-premium");
    assert!(premium.app_settings().contains(&("FUNCTIONS_WORKER_RUNTIME", "'custom'")));
    assert!(premium.text.contains("var triggerOff = 'AzureWebJobs.InvalidateCache.Disabled'"));
    assert!(functions.iter().any(|(name, _)| name == "InvalidateCache"));
    let staging = premium.text.split("resource staging").nth(1).expect("a staging slot");
    assert!(staging.contains("name: triggerOff"), "the trigger is off in the staging slot");
    let sticky = premium.text.split("'slotConfigNames'").nth(1).expect("settings that do not swap");
    assert!(sticky.contains("triggerOff"), "and stays off there after a swap");
}

#[test]
fn azd_packages_what_the_workflow_deploys_from_paths_that_exist() {
    let azure = yaml("azure.yaml");
    let main = Bicep::read(&format!(
        "{}/{}.bicep",
        azure["infra"]["path"].as_str().unwrap(),
        azure["infra"]["module"].as_str().unwrap()
    ));
    let services = azure["services"].as_hash().unwrap();
    assert_eq!(services.len(), 1);
    let (name, service) = services.iter().next().unwrap();
    assert!(main.text.contains(&format!("'azd-service-name': '{}'", name.as_str().unwrap())), "azd finds the app");
    read(&format!("{}/host.json", service["project"].as_str().unwrap()));
    assert_eq!((&service["host"], &service["language"]), (&yaml_text("function"), &yaml_text("custom")));

    let package = service["dist"].as_str().unwrap();
    assert!(package.ends_with(".zip"), "a folder would be zipped by azd, without the execute bit");
    let deploy = yaml(".github/workflows/deploy.yml");
    let steps = deploy["jobs"]["package"]["steps"].as_vec().unwrap();
    assert!(steps.iter().any(|step| step["with"]["path"].as_str() == Some(package)), "{package} is uploaded");

    let hooks = [&service["hooks"]["prepackage"], &azure["hooks"]["postprovision"]];
    for hook in hooks {
        for (system, shell) in [("windows", "pwsh"), ("posix", "sh")] {
            assert_eq!(hook[system]["shell"].as_str(), Some(shell));
            let run = hook[system]["run"].as_str().unwrap();
            let script = run.strip_prefix("bash ").unwrap_or(run);
            assert!(root().join(script).exists(), "{script} does not exist");
        }
    }
    assert!(steps.iter().any(|step| step["run"].as_str() == Some("bash scripts/package")));
    assert_eq!(service["hooks"]["prepackage"]["posix"]["run"].as_str(), Some("bash scripts/package"));
}

fn yaml_text(text: &str) -> Yaml {
    Yaml::String(text.to_owned())
}

#[test]
fn the_hooks_read_what_the_deployment_tells_and_run_files_that_exist() {
    let main = Bicep::read("infra/main.bicep");
    let outputs: BTreeSet<_> = main.declared("output").into_iter().map(|(name, _)| name.to_owned()).collect();
    let shell = read("infra/hooks/postprovision.sh");
    let pwsh = read("infra/hooks/postprovision.ps1");
    let names = |text: &str, sigil: &str| -> BTreeSet<String> {
        let after = text.split(sigil).skip(1);
        let words = after.map(|rest| rest.split(|c: char| !c.is_ascii_uppercase() && c != '_').next().unwrap_or(""));
        words.filter(|word| word.len() > 2).map(str::to_owned).collect()
    };
    let (read_by_sh, read_by_pwsh) = (names(&shell, "$"), names(&pwsh, "$env:"));
    assert_eq!(read_by_sh, read_by_pwsh, "both hooks do the same");
    // What the deployment says, and what whoever deploys may.
    let told: BTreeSet<_> = read_by_sh.difference(&outputs).map(String::as_str).collect();
    // azd's own besides.
    assert_eq!(told, BTreeSet::from(["AZURE_SUBSCRIPTION_ID", "SAMPLE_CATALOGUE"]), "of {outputs:?}");
    assert!(read("docs/deploy.md").contains("| `SAMPLE_CATALOGUE` |"));
    assert!(read_by_sh.len() >= 6, "{read_by_sh:?}");

    let files = ["sqlserver.sql", "sqlserver-access.sql", "sqlserver-identity.sql"];
    for text in [&shell, &pwsh] {
        let run = &text[text.find("all() {").or(text.find("function Invoke-All")).unwrap()..];
        let places: Vec<_> = files[1..].iter().map(|file| run.find(file).expect(file)).collect();
        assert!(text.contains(files[0]));
        assert!(places.is_sorted(), "access, then the user");
    }
    for file in files {
        read(&format!("sql/{file}"));
    }
    // The roles that the user joins are those that were made.
    for role in ["product_cache_reader", "product_cache_trigger"] {
        assert!(read("sql/sqlserver-access.sql").contains(&format!("CREATE ROLE {role}")));
        assert!(read("sql/sqlserver-identity.sql").contains(&format!("ALTER ROLE {role} ADD MEMBER")));
    }
}

#[test]
fn actions_are_pinned_and_jobs_may_do_as_little_as_possible() {
    let mut pins = BTreeMap::new();
    for path in workflows() {
        for line in read(&path).lines() {
            let Some(uses) = line.trim().trim_start_matches("- ").strip_prefix("uses: ") else { continue };
            let (action, version) = uses.split_once(" # ").unwrap_or_else(|| panic!("{path}: {line}: which version?"));
            let (name, commit) = action.split_once('@').unwrap_or_else(|| panic!("{path}: {line}"));
            let hex = commit.len() == 40 && commit.chars().all(|c| c.is_ascii_digit() || ('a'..='f').contains(&c));
            assert!(hex, "{path}: {name} is not pinned to a commit");
            let parts: Vec<_> = version.strip_prefix('v').unwrap_or("").split('.').collect();
            let exact = parts.len() == 3 && parts.iter().all(|part| part.parse::<u32>().is_ok());
            assert!(exact, "{path}: {name}: {version} is no exact version");
            let pin = pins.entry(name.to_owned()).or_insert_with(|| action.to_owned());
            assert_eq!(pin, action, "{path}: one version of an action");
        }

        let workflow = yaml(&path);
        let allowed = workflow["permissions"].as_hash().unwrap_or_else(|| panic!("{path}: permissions"));
        assert!(allowed.values().all(|right| right.as_str() == Some("read")), "{path}: {allowed:?}");
        assert!(!workflow["concurrency"].is_badvalue(), "{path}: concurrency");
        assert!(workflow["on"]["pull_request_target"].is_badvalue(), "{path}: runs others' code with our rights");
        for (name, job) in workflow["jobs"].as_hash().unwrap() {
            let name = name.as_str().unwrap();
            assert!(job["timeout-minutes"].as_i64().is_some(), "{path}: {name} has no end");
            let writes = job["permissions"].as_hash().into_iter().flatten();
            let writes: Vec<_> = writes.filter(|(_, right)| right.as_str() != Some("read")).collect();
            let deploys = (path.as_str(), name) == (".github/workflows/deploy.yml", "deploy");
            assert_eq!(writes.is_empty(), !deploys, "{path}: {name}: {writes:?}");
            if deploys {
                assert_eq!(writes, [(&yaml_text("id-token"), &yaml_text("write"))]);
                assert!(job["environment"].as_str().is_some(), "protected by an environment");
            }
            for step in job["steps"].as_vec().unwrap() {
                if let Some(run) = step["run"].as_str() {
                    assert!(!run.contains("${{"), "{path}: {name}: what is put into a script can be a script: {run}");
                }
                if step["uses"].as_str().is_some_and(|uses| uses.starts_with("actions/checkout@")) {
                    assert_eq!(step["with"]["persist-credentials"].as_bool(), Some(false), "{path}: {name}");
                }
            }
        }
    }
    assert!(pins.contains_key("azure/login"), "{pins:?}");
}

#[test]
fn what_the_documents_name_is_there() {
    let deploy = read("docs/deploy.md");
    let workflow = read(".github/workflows/deploy.yml");
    for rest in workflow.split("vars.").skip(1) {
        let name = rest.split(|c: char| !c.is_ascii_uppercase() && c != '_').next().unwrap();
        assert!(deploy.contains(&format!("`{name}`")), "docs/deploy.md does not say what {name} is");
    }
    let parameters = read("infra/main.parameters.json");
    for rest in parameters.split("${").skip(1) {
        let name = rest.split(['=', '}']).next().unwrap();
        assert!(name.starts_with("AZURE_") || deploy.contains(&format!("`{name}`")), "docs/deploy.md: {name}");
    }
    for path in files("docs") {
        for rest in read(&path).split("](").skip(1) {
            let link = rest.split([')', '#']).next().unwrap();
            if !link.contains("://") && !link.is_empty() {
                assert!(root().join("docs").join(link).exists(), "{path}: {link}");
            }
        }
    }
}
