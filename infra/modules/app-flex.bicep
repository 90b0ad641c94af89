// The function app on Flex Consumption. Runtime, package and scale are functionAppConfig here; the app settings that say
// the same on other plans (FUNCTIONS_WORKER_RUNTIME, FUNCTIONS_EXTENSION_VERSION, WEBSITE_…) must not be set.

@description('Name of the app.')
param name string

@description('Region.')
param location string

@description('Tags; azd finds the app by azd-service-name.')
param tags object

@description('Resource id of the app\'s identity.')
param identityId string

@description('App settings.')
param settings array

@description('URL of the container that the package is kept in.')
param packageContainer string

@description('Most instances.')
param maximumInstanceCount int

@description('Memory of an instance in MB.')
param instanceMemoryMB int

@description('Resource id of the subnet that calls leave from; empty: none.')
param subnetId string

resource plan 'Microsoft.Web/serverfarms@2024-11-01' = {
  name: 'plan-${name}'
  location: location
  tags: tags
  kind: 'functionapp'
  sku: {
    name: 'FC1'
    tier: 'FlexConsumption'
  }
  properties: {
    reserved: true
  }
}

resource app 'Microsoft.Web/sites@2024-11-01' = {
  name: name
  location: location
  tags: tags
  kind: 'functionapp,linux'
  identity: {
    type: 'UserAssigned'
    userAssignedIdentities: {
      '${identityId}': {}
    }
  }
  properties: {
    serverFarmId: plan.id
    httpsOnly: true
    virtualNetworkSubnetId: empty(subnetId) ? null : subnetId
    siteConfig: {
      minTlsVersion: '1.2'
      appSettings: settings
    }
    functionAppConfig: {
      runtime: {
        name: 'custom'
        version: '1.0'
      }
      deployment: {
        storage: {
          type: 'blobContainer'
          value: packageContainer
          authentication: {
            type: 'UserAssignedIdentity'
            userAssignedIdentityResourceId: identityId
          }
        }
      }
      scaleAndConcurrency: {
        maximumInstanceCount: maximumInstanceCount
        instanceMemoryMB: instanceMemoryMB
        // The trigger's instance must not go: with a managed identity the scale controller cannot look for changes, and
        // would never start one (https://github.com/Azure/azure-functions-sql-extension/issues/1235). The one for HTTP
        // keeps its memory warm.
        alwaysReady: [
          {
            name: 'http'
            instanceCount: 1
          }
          {
            name: 'function:InvalidateCache'
            instanceCount: 1
          }
        ]
      }
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

@description('Base address.')
output url string = 'https://${app.properties.defaultHostName}'
