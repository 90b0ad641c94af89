// The host's own storage account, which also holds the app's packages. Shared keys are off: there are identities only.

@description('Name of the account.')
param name string

@description('Region.')
param location string

@description('Tags.')
param tags object

@description('Object id of the app\'s identity.')
param principalId string

@description('Object id of whoever uploads packages for the Premium plan; empty: nobody (Flex Consumption uploads with the app\'s identity).')
param uploaderId string

@description('What the uploader is.')
param uploaderType string

@description('Whether the account is on the private network only.')
param privateNetwork bool

@description('Resource id of the network, if private.')
param networkId string

@description('Resource id of the subnet for private endpoints, if private.')
param endpointSubnetId string

// What the host needs: its leases and keys are blobs (Storage Blob Data Owner), its diagnostic events rows of a table
// (Storage Table Data Contributor). No trigger here uses queues.
var hostRoles = [
  'b7e6dc6d-f1e8-4753-8033-0f276bb0955b'
  '0a9a7e1f-b9d0-4cc4-a60d-0319b160aaa3'
]
// Storage Blob Data Contributor
var uploader = 'ba92f5b4-2d11-453d-a403-e96b0029c9fe'

resource account 'Microsoft.Storage/storageAccounts@2024-01-01' = {
  name: name
  location: location
  tags: tags
  kind: 'StorageV2'
  sku: {
    name: 'Standard_LRS'
  }
  properties: {
    allowSharedKeyAccess: false
    defaultToOAuthAuthentication: true
    allowBlobPublicAccess: false
    minimumTlsVersion: 'TLS1_2'
    supportsHttpsTrafficOnly: true
    publicNetworkAccess: privateNetwork ? 'Disabled' : 'Enabled'
    networkAcls: {
      bypass: 'AzureServices'
      defaultAction: privateNetwork ? 'Deny' : 'Allow'
    }
  }
}

resource blobs 'Microsoft.Storage/storageAccounts/blobServices@2024-01-01' = {
  parent: account
  name: 'default'
}

resource releases 'Microsoft.Storage/storageAccounts/blobServices/containers@2024-01-01' = {
  parent: blobs
  name: 'releases'
  properties: {
    publicAccess: 'None'
  }
}

resource host 'Microsoft.Authorization/roleAssignments@2022-04-01' = [
  for role in hostRoles: {
    name: guid(account.id, principalId, role)
    scope: account
    properties: {
      principalId: principalId
      principalType: 'ServicePrincipal'
      roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', role)
    }
  }
]

resource upload 'Microsoft.Authorization/roleAssignments@2022-04-01' = if (!empty(uploaderId)) {
  name: guid(releases.id, uploaderId, uploader)
  scope: releases
  properties: {
    principalId: uploaderId
    principalType: uploaderType
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', uploader)
  }
}

module endpoints 'private-endpoint.bicep' = [
  for service in (privateNetwork ? ['blob', 'table'] : []): {
    name: 'endpoint-${service}'
    params: {
      name: 'pe-${name}-${service}'
      location: location
      tags: tags
      serviceId: account.id
      groupId: service
      zoneName: 'privatelink.${service}.${environment().suffixes.storage}'
      networkId: networkId
      subnetId: endpointSubnetId
    }
  }
]

@description('Name of the account.')
output name string = account.name

@description('URL of the container for packages.')
output packageContainer string = '${account.properties.primaryEndpoints.blob}${releases.name}'
