// The function app on Elastic Premium, with a staging slot. It runs from a package in blob storage that it reads with its
// identity: the content share that this plan has otherwise would need the storage account's key.

@description('Name of the app.')
param name string

@description('Region.')
param location string

@description('Tags.')
param tags object

@description('Resource id of the app\'s identity.')
param identityId string

@description('App settings.')
param settings array

@description('URL of the package; empty: none yet.')
param packageUrl string

@description('Most instances; the plan allows up to 100, by region.')
param maximumInstanceCount int

@description('Resource id of the subnet that calls leave from; empty: none.')
param subnetId string

var planSettings = [
  {
    name: 'FUNCTIONS_EXTENSION_VERSION'
    value: '~4'
  }
  {
    name: 'FUNCTIONS_WORKER_RUNTIME'
    value: 'custom'
  }
  {
    name: 'WEBSITE_RUN_FROM_PACKAGE_BLOB_MI_RESOURCE_ID'
    value: identityId
  }
]
var packageSettings = empty(packageUrl) ? [] : [
  {
    name: 'WEBSITE_RUN_FROM_PACKAGE'
    value: packageUrl
  }
]
// In the staging slot the trigger stays off: two versions would share its leases. This one setting does not swap.
var triggerOff = 'AzureWebJobs.InvalidateCache.Disabled'
var identities = {
  type: 'UserAssigned'
  userAssignedIdentities: {
    '${identityId}': {}
  }
}

resource plan 'Microsoft.Web/serverfarms@2024-11-01' = {
  name: 'plan-${name}'
  location: location
  tags: tags
  kind: 'elastic'
  sku: {
    name: 'EP1'
    tier: 'ElasticPremium'
  }
  properties: {
    reserved: true
    maximumElasticWorkerCount: maximumInstanceCount
  }
}

resource app 'Microsoft.Web/sites@2024-11-01' = {
  name: name
  location: location
  tags: tags
  kind: 'functionapp,linux'
  identity: identities
  properties: {
    serverFarmId: plan.id
    httpsOnly: true
    virtualNetworkSubnetId: empty(subnetId) ? null : subnetId
    outboundVnetRouting: {
      applicationTraffic: !empty(subnetId)
    }
    siteConfig: {
      linuxFxVersion: '' // what a custom handler has, said explicitly
      minTlsVersion: '1.2'
      ftpsState: 'Disabled'
      http20Enabled: true
      minimumElasticInstanceCount: 1
      functionAppScaleLimit: maximumInstanceCount
      functionsRuntimeScaleMonitoringEnabled: true
      appSettings: concat(settings, planSettings, packageSettings)
    }
  }
}

resource staging 'Microsoft.Web/sites/slots@2024-11-01' = {
  parent: app
  name: 'staging'
  location: location
  tags: {}
  kind: 'functionapp,linux'
  identity: identities
  properties: {
    serverFarmId: plan.id
    httpsOnly: true
    virtualNetworkSubnetId: empty(subnetId) ? null : subnetId
    outboundVnetRouting: {
      applicationTraffic: !empty(subnetId)
    }
    siteConfig: {
      linuxFxVersion: '' // what a custom handler has, said explicitly
      minTlsVersion: '1.2'
      ftpsState: 'Disabled'
      http20Enabled: true
      functionsRuntimeScaleMonitoringEnabled: true
      appSettings: concat(settings, planSettings, packageSettings, [
        {
          name: triggerOff
          value: 'true'
        }
      ])
    }
  }
}

// The app's own credentials for publishing are refused: whoever deploys signs in.
resource scm 'Microsoft.Web/sites/basicPublishingCredentialsPolicies@2024-11-01' = {
  parent: app
  name: 'scm'
  properties: {
    allow: false
  }
}

resource ftp 'Microsoft.Web/sites/basicPublishingCredentialsPolicies@2024-11-01' = {
  parent: app
  name: 'ftp'
  properties: {
    allow: false
  }
}

resource stagingScm 'Microsoft.Web/sites/slots/basicPublishingCredentialsPolicies@2024-11-01' = {
  parent: staging
  name: 'scm'
  properties: {
    allow: false
  }
}

resource stagingFtp 'Microsoft.Web/sites/slots/basicPublishingCredentialsPolicies@2024-11-01' = {
  parent: staging
  name: 'ftp'
  properties: {
    allow: false
  }
}

resource sticky 'Microsoft.Web/sites/config@2024-11-01' = {
  parent: app
  name: 'slotConfigNames'
  properties: {
    appSettingNames: [
      triggerOff
    ]
  }
}

@description('Base address.')
output url string = 'https://${app.properties.defaultHostName}'
