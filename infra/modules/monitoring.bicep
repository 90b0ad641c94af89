// Application Insights over Log Analytics. Telemetry is accepted from identities only: the instrumentation key in the
// ingestion endpoint names the resource and opens nothing.

@description('Suffix that makes names unique.')
param token string

@description('Region.')
param location string

@description('Tags.')
param tags object

@description('Object id of the identity that may send telemetry.')
param principalId string

// Monitoring Metrics Publisher
var publisher = '3913510d-42f4-4e42-8a64-420c390055eb'

resource workspace 'Microsoft.OperationalInsights/workspaces@2023-09-01' = {
  name: 'log-product-cache-${token}'
  location: location
  tags: tags
  properties: {
    sku: {
      name: 'PerGB2018'
    }
    retentionInDays: 30
    features: {
      disableLocalAuth: true
    }
  }
}

resource insights 'Microsoft.Insights/components@2020-02-02' = {
  name: 'appi-product-cache-${token}'
  location: location
  tags: tags
  kind: 'web'
  properties: {
    Application_Type: 'web'
    WorkspaceResourceId: workspace.id
    DisableLocalAuth: true
  }
}

resource publish 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  name: guid(insights.id, principalId, publisher)
  scope: insights
  properties: {
    principalId: principalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', publisher)
  }
}

@description('Resource id of Application Insights.')
output id string = insights.id

@description('Where telemetry goes: endpoints and the resource\'s name, no credential.')
output ingestion string = insights.properties.ConnectionString
