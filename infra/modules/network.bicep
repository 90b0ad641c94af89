// The virtual network: one subnet the app's calls leave from, one that holds the private endpoints.

@description('Suffix that makes names unique.')
param token string

@description('Region.')
param location string

@description('Tags.')
param tags object

@description('What the app\'s subnet is delegated to: Microsoft.App/environments for Flex Consumption, Microsoft.Web/serverFarms for Premium.')
param delegation string

resource network 'Microsoft.Network/virtualNetworks@2024-05-01' = {
  name: 'vnet-product-cache-${token}'
  location: location
  tags: tags
  properties: {
    addressSpace: {
      addressPrefixes: [
        '10.0.0.0/16'
      ]
    }
    subnets: [
      {
        name: 'app'
        properties: {
          addressPrefix: '10.0.0.0/24'
          delegations: [
            {
              name: 'app'
              properties: {
                serviceName: delegation
              }
            }
          ]
        }
      }
      {
        name: 'endpoints'
        properties: {
          addressPrefix: '10.0.1.0/24'
        }
      }
    ]
  }
}

@description('Resource id of the network.')
output id string = network.id

@description('Resource id of the subnet for the app.')
output appSubnetId string = '${network.id}/subnets/app'

@description('Resource id of the subnet for private endpoints.')
output endpointSubnetId string = '${network.id}/subnets/endpoints'
