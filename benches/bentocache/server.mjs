// What the handler is compared with: BentoCache (memory, Redis, Redis bus) behind node:http, as a custom handler would be.
//
// Settings: HTTP_PORT, REDIS_URL, and TEMPLATE: the JSON of product 0, from which every product is made, so that only
// hits cost what they cost. Hashing and headers are done once per product, as in the handler.
import { createHash } from 'node:crypto'
import { createServer } from 'node:http'
import { BentoCache, bentostore } from 'bentocache'
import { memoryDriver } from 'bentocache/drivers/memory'
import { redisBusDriver, redisDriver } from 'bentocache/drivers/redis'

const redis = new URL(process.env.REDIS_URL)
const connection = { host: redis.hostname, port: Number(redis.port) }
const cache = new BentoCache({
  default: 'products',
  stores: {
    products: bentostore({ ttl: '10h', grace: '24h', timeout: '500ms' })
      // serialize: false is its faster way: objects are kept as they are.
      .useL1Layer(memoryDriver({ maxItems: 100_000, serialize: false }))
      .useL2Layer(redisDriver({ connection }))
      .useBus(redisBusDriver({ connection })),
  },
})

const template = process.env.TEMPLATE
function load(id) {
  const body = template
    .replace('"productID":0', `"productID":${id}`)
    .replace('"Product 0, black"', `"Product ${id}, black"`)
    .replace('"BP-0"', `"BP-${id}"`)
  const etag = `"${createHash('sha256').update(body).digest('hex').slice(0, 32)}"`
  return { body, etag, bytes: Buffer.byteLength(body), loaded: Date.now() }
}

const prefix = '/api/GetProductById?productid='
async function answer(request, response) {
  const id = request.url.startsWith(prefix) ? Number(request.url.slice(prefix.length)) : NaN
  if (!Number.isInteger(id) || id < 1) {
    response.writeHead(400, { 'content-length': 0 }).end()
    return
  }
  const product = await cache.getOrSet({ key: `product:${id}`, factory: () => load(id) })
  if (request.headers['if-none-match'] === product.etag) {
    response.writeHead(304, { etag: product.etag }).end()
    return
  }
  response.writeHead(200, {
    'content-length': product.bytes,
    'content-type': 'application/json; charset=utf-8',
    etag: product.etag,
    'last-modified': 'Tue, 11 Mar 2008 10:01:36 GMT',
    'cache-control': 'private, no-cache',
    age: Math.floor((Date.now() - product.loaded) / 1000),
    'cache-status': 'L1; hit; ttl=3500',
  })
  response.end(product.body)
}

const server = createServer({ keepAliveTimeout: 150_000 }, (request, response) => {
  answer(request, response).catch(() => response.writeHead(503, { 'content-length': 0 }).end())
})
server.listen(Number(process.env.HTTP_PORT), '127.0.0.1', () => {
  console.log(`listening  http://127.0.0.1:${server.address().port}`)
})
